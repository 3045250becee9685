/* Echo of frames with two bytes of length, on epoll and nothing else: no deadlines, limits or counters.
 * Prints its address, and ends when its standard input closes. Linux. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { READ = 64 * 1024, LONGEST = 2 + 65535, EVENTS = 1024 };

/* Bytes between calls: the start of a frame, or frames that the socket did not take. */
struct bytes {
    size_t len;
    char at[];
};

struct conn {
    int fd;
    struct bytes *partial;
    struct bytes *unsent;
};

static char scratch[LONGEST + READ];
static struct conn listener, input;

static void check(int ok, const char *what) {
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static struct bytes *keep(const char *from, size_t len) {
    if (len == 0)
        return NULL;
    struct bytes *kept = malloc(sizeof *kept + len);
    check(kept != NULL, "malloc");
    kept->len = len;
    memcpy(kept->at, from, len);
    return kept;
}

/* Length of the complete frames at the start of `at`. */
static size_t complete(const char *at, size_t len) {
    size_t end = 0;
    while (len - end >= 2) {
        const unsigned char *head = (const unsigned char *)at + end;
        size_t frame = 2 + ((size_t)head[0] << 8 | head[1]);
        if (frame > len - end)
            break;
        end += frame;
    }
    return end;
}

/* Writes, and returns what the socket did not take. */
static struct bytes *sent(int fd, const char *at, size_t len) {
    if (len == 0)
        return NULL;
    ssize_t taken = send(fd, at, len, MSG_NOSIGNAL);
    size_t done = taken < 0 ? 0 : (size_t)taken;
    return keep(at + done, len - done);
}

/* Returns 0 when the connection is over. */
static int drive(struct conn *conn) {
    if (conn->unsent) {
        struct bytes *old = conn->unsent;
        conn->unsent = sent(conn->fd, old->at, old->len);
        free(old);
    }
    while (!conn->unsent) {
        size_t start = 0;
        if (conn->partial) {
            start = conn->partial->len;
            memcpy(scratch, conn->partial->at, start);
        }
        ssize_t count = recv(conn->fd, scratch + start, READ, 0);
        if (count < 0)
            return errno == EAGAIN || errno == EINTR;
        if (count == 0)
            return 0;
        size_t len = start + (size_t)count, frames = complete(scratch, len);
        free(conn->partial);
        conn->partial = keep(scratch + frames, len - frames);
        conn->unsent = sent(conn->fd, scratch, frames);
        if (count < READ)
            return 1;
    }
    return 1;
}

static void add(int poll, struct conn *conn, unsigned events) {
    struct epoll_event event = {.events = events, .data.ptr = conn};
    check(epoll_ctl(poll, EPOLL_CTL_ADD, conn->fd, &event) == 0, "epoll_ctl");
}

static void accept_all(int poll) {
    int fd;
    while ((fd = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct conn *conn = calloc(1, sizeof *conn);
        check(conn != NULL, "calloc");
        conn->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        add(poll, conn, EPOLLIN | EPOLLOUT | EPOLLET);
    }
}

static void end(struct conn *conn) {
    close(conn->fd);
    free(conn->partial);
    free(conn->unsent);
    free(conn);
}

int main(void) {
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof addr;
    listener.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    check(listener.fd >= 0, "socket");
    check(bind(listener.fd, (struct sockaddr *)&addr, size) == 0, "bind");
    check(listen(listener.fd, 1024) == 0, "listen");
    check(getsockname(listener.fd, (struct sockaddr *)&addr, &size) == 0, "getsockname");
    printf("127.0.0.1:%d\n", ntohs(addr.sin_port));
    fflush(stdout);

    int poll = epoll_create1(EPOLL_CLOEXEC);
    check(poll >= 0, "epoll_create1");
    add(poll, &listener, EPOLLIN);
    input.fd = STDIN_FILENO;
    add(poll, &input, EPOLLIN);
    struct epoll_event events[EVENTS];
    for (;;) {
        int count = epoll_wait(poll, events, EVENTS, -1);
        check(count >= 0 || errno == EINTR, "epoll_wait");
        for (int at = 0; at < count; at++) {
            struct conn *conn = events[at].data.ptr;
            if (conn == &input)
                return 0;
            if (conn == &listener)
                accept_all(poll);
            else if (!drive(conn))
                end(conn);
        }
    }
}
