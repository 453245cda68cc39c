/* Preloaded: with PATCH it rewrites every executable page of libc, as a tool that
 * patches code does; with PATCH=merge it offers them with MADV_MERGE. It writes a
 * letter to the file TOLD when it is done. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MADV_MERGE 26

__attribute__((constructor)) static void patch(void) {
  const char *told = getenv("TOLD"), *how = getenv("PATCH");
  char line[512], letter = '.';
  unsigned long start, stop;
  FILE *maps = how ? fopen("/proc/self/maps", "re") : 0;
  while (maps && fgets(line, sizeof line, maps)) {
    if (!strstr(line, "libc.so") || !strstr(line, " r-xp ")) continue;
    if (sscanf(line, "%lx-%lx", &start, &stop) != 2) continue;
    mprotect((void *)start, stop - start, PROT_READ | PROT_WRITE | PROT_EXEC);
    for (unsigned long at = start; at < stop; at += 4096) {
      volatile char *byte = (volatile char *)at;
      *byte = *byte;
    }
    mprotect((void *)start, stop - start, PROT_READ | PROT_EXEC);
    if (!strcmp(how, "merge") && madvise((void *)start, stop - start, MADV_MERGE)) letter = '!';
  }
  if (maps) fclose(maps);
  if (told) {
    int fd = open(told, O_WRONLY | O_CLOEXEC);
    if (write(fd, &letter, 1) != 1) _exit(1);
    close(fd);
  }
}
