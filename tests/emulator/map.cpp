/* kernels/map/ compiled for the emulator. */
#define fkda fkda_maps_of_pieces /* other kernels have some of its names too */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/map/map.cu"

static void join(const void *arguments)
{
    fkda_join_maps(*static_cast<const fkda_join_args *>(arguments));
}

static void states(const void *arguments)
{
    fkda_states(*static_cast<const fkda_states_args *>(arguments));
}

const emulator::Kernel emulator::map_kernels[] = {
    {"fkda_join_maps", join, sizeof(fkda_join_args)},
    {"fkda_states", states, sizeof(fkda_states_args)},
    {},
};
