/* Writes so many MB of memory a second, page by page, and looks whether each page has what was written to it before:
   keeps_memory MB_A_SECOND MIB FILE. FILE has the number of whole rounds, or the place of what was wrong. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { WORDS = 4096 / sizeof(uint64_t) };

static uint64_t word(uint64_t page, uint64_t round, uint64_t at)
{
    return (page * 0x9E3779B97F4A7C15 ^ round) * 0xBF58476D1CE4E5B9 + at;
}

static void say(const char *path, const char *what, uint64_t number)
{
    FILE *file = fopen("/tmp/keeps.new", "w");

    fprintf(file, "%s %lu\n", what, number);
    fclose(file);
    rename("/tmp/keeps.new", path);
}

int main(int argc, char **argv)
{
    uint64_t rate = atol(argv[1]) * 1000000 / 4096 / 100, pages = atol(argv[2]) << 8, done = 0;
    uint64_t(*memory)[WORDS] = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct timespec pause = {0, 10000000};

    (void)argc;
    for (uint64_t round = 1;; round++) {
        for (uint64_t page = 0; page < pages; page++) {
            for (uint64_t at = 0; at < WORDS; at += 32) {
                if (memory[page][at] != (round == 1 ? 0 : word(page, round - 1, at))) {
                    say(argv[3], "wrong", page);
                    return 1;
                }
                memory[page][at] = word(page, round, at);
            }
            if (++done % rate == 0)
                nanosleep(&pause, NULL);
        }
        say(argv[3], "rounds", round);
    }
}
