/* kernels/decode/ compiled for the emulator. */
#define fkda fkda_decode /* other kernels have some of its names too */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/decode/decode.cu"

template <class Arguments, void kernel(Arguments)> static void run(const void *arguments)
{
    kernel(*static_cast<const Arguments *>(arguments));
}

#define KERNELS(suffix)                                                                                      \
    {"fkda_decode_one_" #suffix, run<fkda_decode_args, fkda_decode_one_##suffix>, sizeof(fkda_decode_args)}, \
        {"fkda_decode_steps_" #suffix, run<fkda_decode_args, fkda_decode_steps_##suffix>,                    \
         sizeof(fkda_decode_args)},                                                                          \
        {"fkda_decode_chunk_" #suffix, run<fkda_decode_args, fkda_decode_chunk_##suffix>,                    \
         sizeof(fkda_decode_args)},                                                                          \
        {"fkda_decode_each_" #suffix, run<fkda_decode_args, fkda_decode_each_##suffix>,                      \
         sizeof(fkda_decode_args)},                                                                          \
        {"fkda_decode_past_" #suffix, run<fkda_decode_args, fkda_decode_past_##suffix>,                      \
         sizeof(fkda_decode_args)},                                                                          \
    {                                                                                                        \
        "fkda_decode_apply_" #suffix, run<fkda_apply_args, fkda_decode_apply_##suffix>,                      \
            sizeof(fkda_apply_args)                                                                          \
    }

const emulator::Kernel emulator::decode_kernels[] = {
    KERNELS(f32), KERNELS(bf16), KERNELS(k_first_f32), KERNELS(k_first_bf16), {},
};
