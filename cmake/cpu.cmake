# The CPU backend: one source for the forward pass of a head (head.h and what it includes), compiled once for
# each instruction set.
set(flash_kda_cpu_variants src/cpu/portable.c)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND flash_kda_cpu_variants src/cpu/avx2.c src/cpu/avx512.c)
  set_source_files_properties(src/cpu/avx2.c PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma")
  set_source_files_properties(src/cpu/avx512.c PROPERTIES COMPILE_OPTIONS
    "-mavx2;-mfma;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512")
endif()
# Products and sums become fused multiply-adds where the machine has them, and sqrtf its instruction.
set_property(SOURCE ${flash_kda_cpu_variants} APPEND PROPERTY COMPILE_OPTIONS
  -ffp-contract=fast -fno-math-errno -fno-trapping-math)

target_sources(flashkda PRIVATE
  src/cpu/bwd.c
  src/cpu/bwd_reference.c
  src/cpu/decode.c
  src/cpu/decode_layer.c
  src/cpu/decode_layer_reference.c
  src/cpu/decode_reference.c
  src/cpu/dispatch.c
  src/cpu/fwd.c
  src/cpu/join.c
  src/cpu/map.c
  src/cpu/map_reference.c
  src/cpu/nonfinite.c
  src/cpu/parallel.c
  src/cpu/reference.c
  ${flash_kda_cpu_variants})
