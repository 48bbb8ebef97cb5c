/* Guest work for benchmarks/network.py, and the server outside: net SERVER SCALE, or without words the server.
 * Each row prints "name units microseconds". Built with gcc -O2 -static. */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PORT = 5000, PART = 1 << 17 };
struct order { uint64_t to_server, from_server, trips; };
static char bytes[PART];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void all(int fd, int out, uint64_t left) {
    while (left) {
        size_t part = left < PART ? left : PART;
        ssize_t done = out ? write(fd, bytes, part) : read(fd, bytes, part);
        if (done <= 0)
            die("connection");
        left -= done;
    }
}

static void work(int fd, struct order o, int server) {
    all(fd, !server, o.to_server);
    all(fd, server, o.from_server);
    for (uint64_t i = 0; i < o.trips; i++) {
        all(fd, !server, 1);
        all(fd, server, 1);
    }
    all(fd, server, 1); /* the server has it all */
}

int main(int argc, char **argv) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    struct order o;
    if (argc < 2) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(fd, (void *)&at, sizeof at) || listen(fd, 4))
            die("listen");
        for (;;) {
            int end = accept(fd, 0, 0);
            setsockopt(end, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            if (read(end, &o, sizeof o) == sizeof o)
                work(end, o, 1);
            close(end);
        }
    }
    uint64_t scale = atol(argv[2]);
    struct { const char *name; struct order o; uint64_t units; } rows[] = {
        {"send-MiB", {scale << 27, 0, 0}, scale << 7},
        {"receive-MiB", {0, scale << 27, 0}, scale << 7},
        {"round-trips", {0, 0, 10000 * scale}, 10000 * scale},
    };
    inet_aton(argv[1], &at.sin_addr);
    for (int i = 0; i < 3; i++) {
        struct timespec a, b;
        fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (void *)&at, sizeof at))
            die("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        clock_gettime(CLOCK_MONOTONIC, &a);
        if (write(fd, &rows[i].o, sizeof o) != sizeof o)
            die("order");
        work(fd, rows[i].o, 0);
        clock_gettime(CLOCK_MONOTONIC, &b);
        close(fd);
        printf("%s %lu %lu\n", rows[i].name, (unsigned long)rows[i].units,
               (unsigned long)((b.tv_sec - a.tv_sec) * 1000000 + (b.tv_nsec - a.tv_nsec) / 1000));
        fflush(stdout);
    }
    return 0;
}
