/* Gives a harness every file of folders, or single files: the corpus without a fuzzer, with any compiler. */
#define _POSIX_C_SOURCE 200809L
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

#include "fuzz.h"

static long count;

static void replay_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file) wrong("%s can't be opened", path);
    long size = -1;
    if (fseek(file, 0, SEEK_END) == 0) size = ftell(file);
    if (size < 0 || fseek(file, 0, SEEK_SET) != 0) wrong("%s has no size", path);
    /* Memory of exactly that size, so that AddressSanitizer sees a harness that reads past it. */
    uint8_t *exact = malloc(size ? (size_t)size : 1);
    if (!exact || fread(exact, 1, (size_t)size, file) != (size_t)size) wrong("%s can't be read", path);
    fclose(file);
    LLVMFuzzerTestOneInput(exact, (size_t)size);
    free(exact);
    count++;
}

static void replay(const char *path)
{
    DIR *folder = opendir(path);
    if (!folder) {
        replay_file(path);
        return;
    }
    for (const struct dirent *entry; (entry = readdir(folder));) {
        char name[4096];
        if (entry->d_name[0] == '.') continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        replay(name);
    }
    closedir(folder);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) replay(argv[i]);
    printf("%ld inputs\n", count);
    return count ? 0 : 1;
}
