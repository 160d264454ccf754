/* kernels/decode/layer.cu compiled for the emulator. */
#define fkda fkda_layer /* other kernels have some of its names too */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/decode/layer.cu"

template <void kernel(fkda_decode_layer_args)> static void run(const void *arguments)
{
    kernel(*static_cast<const fkda_decode_layer_args *>(arguments));
}

#define KERNELS(suffix)                                                                                      \
    {"fkda_layer_one_" #suffix, run<fkda_layer_one_##suffix>, sizeof(fkda_decode_layer_args)},               \
    {                                                                                                        \
        "fkda_layer_steps_" #suffix, run<fkda_layer_steps_##suffix>, sizeof(fkda_decode_layer_args)          \
    }

const emulator::Kernel emulator::layer_kernels[] = {
    KERNELS(f32), KERNELS(bf16), KERNELS(k_first_f32), KERNELS(k_first_bf16), {},
};
