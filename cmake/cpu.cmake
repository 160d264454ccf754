# The CPU backend: one chunk kernel, compiled once for each instruction set.
target_sources(flashkda PRIVATE
  src/cpu/fwd.c
  src/cpu/dispatch.c
  src/cpu/parallel.c
  src/cpu/reference.c)
