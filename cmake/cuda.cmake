# Compiles the kernels with nvcc into fat binaries and embeds these in the library. nvcc is a plain command
# here and not a CMake language, because the host code is C and a machine without nvcc still builds the CPU
# backend. Where there is no nvcc, it is fetched from PyPI into the build folder.
find_program(NVCC nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(NOT FLASH_KDA_CUDA)
  message(STATUS "flash_kda: without kernels (FLASH_KDA_CUDA=OFF), so the library has the CPU backend alone")
  return()
endif()

# flash_kda_without_kernels(<reason>)
# Says that the library gets the CPU backend alone, and what can be done. pip hides what a successful build
# prints, so under pip a machine that may have a GPU gets an error instead.
function(flash_kda_without_kernels reason)
  set(mend "Install a CUDA toolkit of version 12.9 or newer, or build where PyPI can be reached")
  if(SKBUILD AND may_have_gpu)
    message(FATAL_ERROR "flash_kda: ${reason}, so no kernels can be built, but this machine has an NVIDIA "
      "driver. ${mend}; `pip install . -Ccmake.define.FLASH_KDA_CUDA=OFF` builds the CPU backend alone.")
  endif()
  message(STATUS "flash_kda: ${reason}, so the library has the CPU backend alone. ${mend}.")
endfunction()

find_library(FLASH_KDA_DRIVER NAMES libcuda.so.1)
mark_as_advanced(FLASH_KDA_DRIVER)
set(may_have_gpu FALSE)
if(FLASH_KDA_DRIVER OR EXISTS /dev/nvidiactl OR EXISTS /dev/dxg)
  set(may_have_gpu TRUE)
endif()

# nvcc takes the machine's g++ for the C++ of a source, so without g++ there is no use in fetching nvcc.
if(NOT NVCC)
  execute_process(COMMAND gcc -x c++ -include cstdlib -fsyntax-only /dev/null
    RESULT_VARIABLE cxx_failed OUTPUT_QUIET ERROR_QUIET)
  if(cxx_failed)
    flash_kda_without_kernels("there is no nvcc, and no g++, which nvcc would need")
    return()
  endif()
  set(python ${Python3_EXECUTABLE} ${PYTHON_EXECUTABLE} python3)
  list(GET python 0 python)
  set(own_nvcc ${CMAKE_CURRENT_BINARY_DIR}/nvcc)
  if(NOT EXISTS ${own_nvcc})
    message(STATUS "flash_kda: there is no nvcc, so it is fetched from PyPI into ${own_nvcc} (130 MB)")
  endif()
  execute_process(COMMAND ${python} ${CMAKE_CURRENT_SOURCE_DIR}/scripts/fetch_nvcc.py ${own_nvcc}
    RESULT_VARIABLE fetch_failed OUTPUT_VARIABLE fetch_says ERROR_VARIABLE fetch_says
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  string(REGEX MATCH "[^\n]*$" last_line "${fetch_says}")
  if(fetch_failed)
    message(VERBOSE "${fetch_says}")
    flash_kda_without_kernels("there is no nvcc, and ${last_line}")
    return()
  endif()
  # Not kept in the cache: a toolkit that is installed later is found instead.
  set(NVCC ${last_line})
endif()
# A GPU runs the machine code of the same major number and a minor number that is not larger than its own:
# 8.6, 8.7 and 8.9 run that of 8.0, 10.3 that of 10.0, and 12.1 that of 12.0.
set(FLASH_KDA_CUDA_ARCHS 80 90 100 120 CACHE STRING "Architectures with machine code")
set(FLASH_KDA_NVCC_FLAGS "" CACHE STRING "More options for nvcc, for example -DFKDA_FOR_RACECHECK")
set(FLASH_KDA_PTX_ARCH 80 CACHE STRING "Architecture of the PTX that newer GPUs compile")
set(FLASH_KDA_COMPILED "" CACHE PATH "The folder `kernels` of another build, whose fat binaries are copied")

# An nvcc may be unusable: it needs a host C++ compiler. And an older nvcc does not know every architecture.
set(probe ${CMAKE_CURRENT_BINARY_DIR}/kernels/probe)
file(WRITE ${probe}.cu "#include <cuda_bf16.h>\nextern \"C\" __global__ void probe() {}\n")
execute_process(
  COMMAND ${NVCC} -fatbin -std=c++17 -arch=compute_${FLASH_KDA_PTX_ARCH} -o ${probe}.fatbin ${probe}.cu
  RESULT_VARIABLE nvcc_failed OUTPUT_VARIABLE nvcc_says ERROR_VARIABLE nvcc_says)
if(nvcc_failed)
  string(STRIP "${nvcc_says}" nvcc_says)
  message(STATUS "flash_kda: ${NVCC} says: ${nvcc_says}")
  flash_kda_without_kernels("${NVCC} cannot compile")
  return()
endif()
execute_process(COMMAND ${NVCC} --list-gpu-arch OUTPUT_VARIABLE nvcc_archs ERROR_QUIET)
set(archs "")
foreach(arch IN LISTS FLASH_KDA_CUDA_ARCHS)
  if(nvcc_archs MATCHES "compute_${arch}\n")
    list(APPEND archs ${arch})
  endif()
endforeach()
if(NOT archs STREQUAL FLASH_KDA_CUDA_ARCHS)
  message(STATUS "flash_kda: ${NVCC} knows ${archs} of the architectures ${FLASH_KDA_CUDA_ARCHS}")
endif()
set(FLASH_KDA_CUDA_ARCHS ${archs})
message(STATUS "flash_kda: CUDA kernels with ${NVCC} for ${archs}")

# flash_kda_find_compiled(<variable> <name> <file>...)
# Sets <variable> to the path, without its ending, of the fat binary <name> in FLASH_KDA_COMPILED, if it was
# made by the same command and is newer than every <file>. Else <variable> is empty.
function(flash_kda_find_compiled variable name)
  set(${variable} "" PARENT_SCOPE)
  set(compiled ${FLASH_KDA_COMPILED}/${name})
  if(NOT FLASH_KDA_COMPILED OR NOT EXISTS ${compiled}.fatbin OR NOT EXISTS ${compiled}.flags)
    return()
  endif()
  file(READ ${compiled}.flags theirs)
  file(READ ${CMAKE_CURRENT_BINARY_DIR}/kernels/${name}.flags ours)
  foreach(file IN LISTS ARGN)
    if(${file} IS_NEWER_THAN ${compiled}.fatbin)
      return()
    endif()
  endforeach()
  if(ours STREQUAL theirs)
    set(${variable} ${compiled} PARENT_SCOPE)
  endif()
endfunction()

# flash_kda_add_kernel(<name> <source> ARCHS <arch>... [PTX <arch>])
# Makes <source> the bytes fkda_fatbin_<name>. The compiler's report of registers, spills and shared memory is
# kept in kernels/<name>.report, which scripts/check_kernels.py reads. The section is the one that nvcc's own
# programs have, so that NVIDIA's tools find the kernels in the library.
function(flash_kda_add_kernel name source)
  cmake_parse_arguments(kernel "" "PTX" "ARCHS" ${ARGN})
  set(gencode "")
  foreach(arch IN LISTS kernel_ARCHS)
    list(APPEND gencode -gencode=arch=compute_${arch},code=sm_${arch})
  endforeach()
  if(kernel_PTX)
    list(APPEND gencode -gencode=arch=compute_${kernel_PTX},code=compute_${kernel_PTX})
  endif()
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/kernels)
  set(fatbin ${folder}/${name}.fatbin)
  set(embed ${folder}/${name}.c)
  set(kernels ${CMAKE_CURRENT_SOURCE_DIR}/kernels)
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS ${kernels}/*.cuh ${kernels}/*.h)
  file(MAKE_DIRECTORY ${folder})
  set(flags -fatbin -O3 -fmad=false -std=c++17 --threads 0 -Xptxas=-v ${FLASH_KDA_NVCC_FLAGS} ${gencode})
  file(WRITE ${folder}/${name}.flags "${NVCC} ${flags}")
  flash_kda_find_compiled(compiled ${name} ${CMAKE_CURRENT_SOURCE_DIR}/${source} ${headers})
  if(compiled)
    add_custom_command(
      OUTPUT ${fatbin}
      COMMAND ${CMAKE_COMMAND} -E copy ${compiled}.fatbin ${compiled}.report ${folder}
      DEPENDS ${compiled}.fatbin ${source} ${headers}
      COMMENT "Copying ${compiled}.fatbin"
      VERBATIM)
  else()
    set(report ${folder}/${name}.report)
    add_custom_command(
      OUTPUT ${fatbin}
      COMMAND sh -c "\"$0\" \"$@\" > ${report} 2>&1 || { cat ${report}; exit 1; }"
              ${NVCC} ${flags} -MD -MF ${folder}/${name}.d -MT ${fatbin} -o ${fatbin}
              ${CMAKE_CURRENT_SOURCE_DIR}/${source}
      DEPENDS ${source}
      DEPFILE ${folder}/${name}.d # the headers that the source includes
      COMMENT "Compiling ${source} for ${kernel_ARCHS}"
      VERBATIM)
  endif()
  file(GENERATE OUTPUT ${embed} CONTENT
"/* ${source}, compiled. */
__asm__(\".section .nv_fatbin,\\\"a\\\"\\n\"
        \".balign 16\\n\"
        \".global fkda_fatbin_${name}\\n\"
        \".hidden fkda_fatbin_${name}\\n\"
        \"fkda_fatbin_${name}:\\n\"
        \".incbin \\\"${fatbin}\\\"\\n\"
        \".previous\\n\");
")
  set_source_files_properties(${embed} PROPERTIES OBJECT_DEPENDS ${fatbin})
  target_sources(flashkda PRIVATE ${embed})
endfunction()

flash_kda_add_kernel(portable_fwd kernels/portable/fwd.cu
  ARCHS ${FLASH_KDA_CUDA_ARCHS} PTX ${FLASH_KDA_PTX_ARCH})
flash_kda_add_kernel(nonfinite kernels/nonfinite/count.cu
  ARCHS ${FLASH_KDA_CUDA_ARCHS} PTX ${FLASH_KDA_PTX_ARCH})
flash_kda_add_kernel(map kernels/map/map.cu
  ARCHS ${FLASH_KDA_CUDA_ARCHS} PTX ${FLASH_KDA_PTX_ARCH})
flash_kda_add_kernel(backward kernels/backward/backward.cu
  ARCHS ${FLASH_KDA_CUDA_ARCHS} PTX ${FLASH_KDA_PTX_ARCH})
flash_kda_add_kernel(decode kernels/decode/decode.cu
  ARCHS ${FLASH_KDA_CUDA_ARCHS} PTX ${FLASH_KDA_PTX_ARCH})
flash_kda_add_kernel(decode_layer kernels/decode/layer.cu
  ARCHS ${FLASH_KDA_CUDA_ARCHS} PTX ${FLASH_KDA_PTX_ARCH})
target_sources(flashkda PRIVATE
  src/cuda/bwd.c src/cuda/bwd_waves.c src/cuda/decode.c src/cuda/decode_launch.c src/cuda/decode_layer.c
  src/cuda/map.c src/cuda/nonfinite.c src/cuda/portable/portable.c)
target_compile_definitions(flashkda PRIVATE FKDA_WITH_CUDA)

# The Hopper kernels are compiled for 90a, which alone has wgmma and setmaxnreg; PTX cannot carry these to
# other architectures. An nvcc may know 90 and not 90a, and --list-gpu-arch does not show 90a, so compiling
# for 90a is tried.
set(hopper_failed TRUE)
if(90 IN_LIST FLASH_KDA_CUDA_ARCHS)
  execute_process(
    COMMAND ${NVCC} -fatbin -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o ${probe}.fatbin ${probe}.cu
    RESULT_VARIABLE hopper_failed OUTPUT_QUIET ERROR_QUIET)
  if(hopper_failed)
    message(STATUS "flash_kda: ${NVCC} does not know 90a, so compute capability 9.0 runs the portable kernel")
  endif()
endif()
if(NOT hopper_failed)
  flash_kda_add_kernel(hopper_fwd kernels/hopper/fwd.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_segments kernels/hopper/segments.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_general_fwd kernels/hopper/general_fwd.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_general_segments kernels/hopper/general_segments.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_bounded kernels/hopper/bounded.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_softplus kernels/hopper/softplus.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_activated kernels/hopper/activated.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_fp32_gates kernels/hopper/fp32_gates.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_states_fwd kernels/hopper/states_fwd.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_states_segments kernels/hopper/states_segments.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_walk kernels/hopper/bwd/walk.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_general_walk kernels/hopper/bwd/general_walk.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_bwd_first kernels/hopper/bwd/first.cu ARCHS 90a)
  flash_kda_add_kernel(hopper_bwd_chunks kernels/hopper/bwd/chunks/chunks.cu ARCHS 90a)
  target_sources(flashkda PRIVATE
    src/cuda/hopper/bwd.c
    src/cuda/hopper/costs.c
    src/cuda/hopper/explain.c
    src/cuda/hopper/hopper.c
    src/cuda/hopper/launch.c
    src/cuda/hopper/plan.c
    src/cuda/hopper/relay_plan.c
    src/cuda/hopper/stretches.c
    src/cuda/hopper/border_states.c
    src/cuda/hopper/walks.c
    src/cuda/hopper/workspace.c)
  target_compile_definitions(flashkda PRIVATE FKDA_WITH_HOPPER)
endif()
