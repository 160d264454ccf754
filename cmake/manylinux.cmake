# The toolchain of the wheels: cmake --toolchain cmake/manylinux.cmake. Zig's C compiler (Clang) links against
# the symbols that a chosen version of the C library had, for any architecture, so that a library that is
# built on a new system is loaded on an old one. `make wheel` installs Zig from PyPI.
set(FLASH_KDA_ARCH x86_64 CACHE STRING "The architecture: x86_64 or aarch64")
set(FLASH_KDA_GLIBC 2.28 CACHE STRING "The oldest version of the C library that the result runs with")
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR ${FLASH_KDA_ARCH})
find_program(FLASH_KDA_ZIG NAMES zig python-zig REQUIRED)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES FLASH_KDA_ARCH FLASH_KDA_GLIBC FLASH_KDA_ZIG)
set(CMAKE_C_COMPILER ${FLASH_KDA_ZIG} cc)
set(CMAKE_C_COMPILER_TARGET ${FLASH_KDA_ARCH}-linux-gnu.${FLASH_KDA_GLIBC})
# The linker of Zig knows no incremental state and no build id unless it is asked for one.
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-s -Wl,--build-id=sha1")
set(CMAKE_EXE_LINKER_FLAGS_INIT "-s")
