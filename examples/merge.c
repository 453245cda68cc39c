/* MADV_MERGE in a C program:  cc -o merge merge.c && sksm run -- ./merge */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define MADV_MERGE 26 /* the number that was proposed; no header has it yet */

int main(void) {
  size_t size = 64 << 20;
  char *data = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(data, 'x', size);                        /* 16384 equal pages */
  if (madvise(data, size, MADV_MERGE)) perror("madvise"); /* are one from here on */
  return data[size - 1] != 'x';
}
