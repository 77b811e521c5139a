/* A wall clock that can be set for some processes only: loaded before libc, it adds what a shared file says. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long still = 0;
static const volatile long *offset_s = NULL;

static long seconds(void) {
    if (offset_s == NULL) {
        const char *path = getenv("MEDDAM_FAULTS_CLOCK");
        int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
        if (file >= 0) close(file);
        offset_s = page == MAP_FAILED ? &still : page;
    }
    return *offset_s;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += seconds();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}

/* Who waits until a time of this clock is to be woken by it, and the kernel waits by its own. Times of the monotonic
   clock, which some of these calls take as well, are far below a thousand million seconds. */
static const struct timespec *true_time(const struct timespec *until, struct timespec *space) {
    if (until == NULL || until->tv_sec < 1000000000) return until;
    *space = *until;
    space->tv_sec -= seconds();
    return space;
}

int pthread_cond_timedwait(pthread_cond_t *it, pthread_mutex_t *held, const struct timespec *until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec space;
    if (!real) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    return real(it, held, true_time(until, &space));
}

int pthread_cond_clockwait(pthread_cond_t *it, pthread_mutex_t *held, clockid_t clock, const struct timespec *until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    struct timespec space;
    if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    return real(it, held, clock, true_time(until, &space));
}

int sem_timedwait(sem_t *it, const struct timespec *until) {
    static int (*real)(sem_t *, const struct timespec *);
    struct timespec space;
    if (!real) real = dlsym(RTLD_NEXT, "sem_timedwait");
    return real(it, true_time(until, &space));
}

int sem_clockwait(sem_t *it, clockid_t clock, const struct timespec *until) {
    static int (*real)(sem_t *, clockid_t, const struct timespec *);
    struct timespec space;
    if (!real) real = dlsym(RTLD_NEXT, "sem_clockwait");
    return real(it, clock, true_time(until, &space));
}

long syscall(long number, ...) {
    static long (*real)(long, ...);
    struct timespec space;
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
    va_end(rest);
    if (!real) real = dlsym(RTLD_NEXT, "syscall");
    if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME)) a[3] = (long)true_time((void *)a[3], &space);
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
