/* Writes so many MB of memory a second, page by page, and a dot to standard output every 5 ms: dirty MB_A_SECOND. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SIZE = 256 << 20 };

int main(int argc, char **argv)
{
    long rate = argc > 1 ? atol(argv[1]) : 0, pages = rate * 1000000 / PAGE / 200, at = 0;
    char *memory = malloc(SIZE);
    struct timespec next;
    unsigned turn = 0;

    for (long i = 0; rate && i < SIZE; i += PAGE)
        memory[i] = 1;
    if (write(1, "begun\n", 6) != 6)
        return 1;
    clock_gettime(CLOCK_MONOTONIC, &next);
    for (;;) {
        turn++;
        for (long i = 0; i < pages; i++, at = (at + PAGE) % SIZE)
            memory[at + turn % PAGE] = (char)turn;
        if (write(1, ".", 1) != 1)
            return 1;
        next.tv_nsec += 5000000;
        if (next.tv_nsec >= 1000000000) {
            next.tv_nsec -= 1000000000;
            next.tv_sec++;
        }
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
}
