/* Writes a file's blocks anew, one after another at random, and looks whether each has what was written to it before:
   keeps_disk FILE STATUS [direct]. STATUS has the number of writes, or what was wrong. What a block should have is in memory, so
   that a disk of another moment than the memory is found; so is a clock that goes back. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { BLOCKS = 96, SIZE = 65536, WORDS = SIZE / sizeof(uint64_t) };

static uint64_t block[WORDS] __attribute__((aligned(4096)));
static uint64_t written[BLOCKS];

static void say(const char *path, const char *what, uint64_t number)
{
    FILE *file = fopen("/tmp/keeps_disk.new", "w");

    fprintf(file, "%s %lu\n", what, number);
    fclose(file);
    rename("/tmp/keeps_disk.new", path);
}

static uint64_t word(uint64_t which, uint64_t at)
{
    return (which * 0x9E3779B97F4A7C15 ^ written[which]) * 0xBF58476D1CE4E5B9 + at;
}

int main(int argc, char **argv)
{
    int fd = open(argv[1], O_RDWR | O_CREAT | (argc > 3 ? O_DIRECT : 0), 0600);
    struct timespec now, last = {0, 0};

    for (uint64_t turn = 1;; turn++) {
        uint64_t which = turn <= BLOCKS ? turn - 1 : (uint64_t)random() % BLOCKS;

        if (written[which]) {
            if (pread(fd, block, SIZE, which * SIZE) != SIZE)
                return say(argv[2], "unread", which), 1;
            for (uint64_t at = 0; at < WORDS; at++)
                if (block[at] != word(which, at))
                    return say(argv[2], "wrong", which), 1;
        }
        written[which]++;
        for (uint64_t at = 0; at < WORDS; at++)
            block[at] = word(which, at);
        if (pwrite(fd, block, SIZE, which * SIZE) != SIZE)
            return say(argv[2], "unwritten", which), 1;
        if (turn % 16 == 0 && fdatasync(fd))
            return say(argv[2], "unflushed", which), 1;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec < last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec))
            return say(argv[2], "backwards", turn), 1;
        last = now;
        say(argv[2], "writes", turn);
    }
}
