/* A disk that fills up below one folder, for a process that is started with this preloaded.

   Every call that needs room there counts, whoever makes it: Python, a library in C or in Rust. The
   first that a pattern matches gets half of what it asks for where it writes, else nothing; all
   after it get nothing, until `full_disk` is called again. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX], wanted[PATH_MAX];
static int reason, full;
static FILE *said;
static __thread int inside;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Begin to watch `folder`; `pattern` is of a call and a path below it, empty for a disk that stays
   as it is; `log` names a file for a line per call, or is empty. Returns whether it became full. */
int full_disk(const char *folder, const char *pattern, int error, const char *log)
{
    inside = 1;
    if (said) fclose(said);
    said = *log ? fopen(log, "w") : NULL;
    inside = 0;
    int before = full;
    snprintf(root, sizeof root, "%s", folder);
    snprintf(wanted, sizeof wanted, "%s", pattern);
    full = 0;
    reason = error;
    return before;
}

/* Whether a call that needs room for a path is the first refused (1), a later one (2), or goes
   through (0). */
static int refused(const char *call, const char *path)
{
    char line[2 * PATH_MAX];
    if (inside || !*root || strncmp(path, root, strlen(root))) return 0;
    snprintf(line, sizeof line, "%s %s", call, path + strlen(root));
    inside = 1;
    if (said) { fprintf(said, "%s\n", line); fflush(said); }
    inside = 0;
    if (!full && (!*wanted || fnmatch(wanted, line, 0))) return 0;
    errno = reason;
    return full++ ? 2 : 1;
}

static int of_handle(const char *call, int handle)
{
    char link[64], path[PATH_MAX];
    if (inside || !*root) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return refused(call, path);
}

static int of_name(const char *call, int folder, const char *name)
{
    char path[2 * PATH_MAX], link[64];
    if (inside || !*root) return 0;
    if (*name == '/') return refused(call, name);
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    snprintf(path + length, PATH_MAX, "/%s", name);
    return refused(call, path);
}

static int makes(int folder, const char *name, int flags)
{
    struct stat found;
    if (inside || !*root || !(flags & O_CREAT)) return 0;
    return fstatat(folder, name, &found, 0) && of_name("open", folder, name);
}

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...)                                                     \
    {                                                                                              \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                    \
        va_end(more);                                                                              \
        return makes(AT_FDCWD, path, flags) ? -1 : REAL(name)(path, flags, mode);                  \
    }
#define OPENAT(name)                                                                               \
    int name(int folder, const char *path, int flags, ...)                                         \
    {                                                                                              \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                    \
        va_end(more);                                                                              \
        return makes(folder, path, flags) ? -1 : REAL(name)(folder, path, flags, mode);            \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int handle, const void *data, size_t size)
{
    int how = of_handle("write", handle);
    if (how == 2 || (how == 1 && size < 2)) return -1;
    return REAL(write)(handle, data, how ? size / 2 : size);
}

#define PWRITE(name, offset_type)                                                                  \
    ssize_t name(int handle, const void *data, size_t size, offset_type offset)                    \
    {                                                                                              \
        int how = of_handle("write", handle);                                                      \
        if (how == 2 || (how == 1 && size < 2)) return -1;                                         \
        return REAL(name)(handle, data, how ? size / 2 : size, offset);                            \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int handle, const struct iovec *parts, int count)
{
    return of_handle("write", handle) ? -1 : REAL(writev)(handle, parts, count);
}

/* The rest get all or nothing. */

/* Where there is room nothing is flushed, as nothing here cuts the power. */
int fsync(int handle) { return of_handle("fsync", handle) ? -1 : 0; }
int fdatasync(int handle) { return of_handle("fsync", handle) ? -1 : 0; }
int ftruncate(int handle, off_t size)
{
    return size && of_handle("truncate", handle) ? -1 : REAL(ftruncate)(handle, size);
}
int ftruncate64(int handle, off64_t size)
{
    return size && of_handle("truncate", handle) ? -1 : REAL(ftruncate64)(handle, size);
}
int posix_fallocate(int handle, off_t start, off_t size)
{
    return of_handle("allocate", handle) ? reason : REAL(posix_fallocate)(handle, start, size);
}
int fallocate64(int handle, int mode, off64_t start, off64_t size)
{
    return of_handle("allocate", handle) ? -1 : REAL(fallocate64)(handle, mode, start, size);
}
ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *end, size_t size, unsigned flags)
{
    return of_handle("copy", to) ? -1 : REAL(copy_file_range)(from, start, to, end, size, flags);
}
ssize_t sendfile(int to, int from, off_t *start, size_t size);
ssize_t sendfile64(int to, int from, off64_t *start, size_t size);
ssize_t sendfile(int to, int from, off_t *start, size_t size)
{
    return of_handle("copy", to) ? -1 : REAL(sendfile)(to, from, start, size);
}
ssize_t sendfile64(int to, int from, off64_t *start, size_t size)
{
    return of_handle("copy", to) ? -1 : REAL(sendfile64)(to, from, start, size);
}
int mkdir(const char *path, mode_t mode)
{
    struct stat found;
    int there = inside || !*root || !stat(path, &found);
    return !there && of_name("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode);
}
int link(const char *old, const char *new)
{
    return of_name("link", AT_FDCWD, new) ? -1 : REAL(link)(old, new);
}
int linkat(int from, const char *old, int to, const char *new, int flags)
{
    return of_name("link", to, new) ? -1 : REAL(linkat)(from, old, to, new, flags);
}
int symlink(const char *old, const char *new)
{
    return of_name("link", AT_FDCWD, new) ? -1 : REAL(symlink)(old, new);
}
int rename(const char *old, const char *new)
{
    return of_name("rename", AT_FDCWD, new) ? -1 : REAL(rename)(old, new);
}
