/* Prints the version of the installed library, which must be the installed header's. */
#include <flash_kda.h>
#include <stdio.h>

int main(void)
{
    int major, minor, patch;
    if (sscanf(flash_kda_version(), "%d.%d.%d", &major, &minor, &patch) != 3) return 1;
    printf("flash_kda %s\n", flash_kda_version());
    return major != FLASH_KDA_VERSION_MAJOR || minor != FLASH_KDA_VERSION_MINOR ||
           patch != FLASH_KDA_VERSION_PATCH;
}
