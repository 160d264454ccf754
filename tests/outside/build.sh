#!/bin/sh
# build.sh CMAKE BUILD CC: installs what was built in BUILD, moves the installation, and builds a project
# outside of this one on it, with CMake and with pkg-config. Exits with 77 where there is no pkg-config.
set -eu
cmake=$1
build=$2
cc=$3
here=$(cd "$(dirname "$0")" && pwd)
work=$build/tests/outside
rm -rf "$work"
mkdir -p "$work"
"$cmake" --install "$build" --prefix "$work/first" >/dev/null
mv "$work/first" "$work/installed"

"$cmake" -S "$here" -B "$work/with-cmake" "-DCMAKE_PREFIX_PATH=$work/installed" "-DCMAKE_C_COMPILER=$cc" \
    >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$cmake" --build "$work/with-cmake" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
said=$("$work/with-cmake/outside")
echo "with CMake: $said"
[ "$("$work/installed/bin/flash-kda" info | head -n 1)" = "$said" ] || { echo "another command"; exit 1; }

pkg_config=$(command -v pkg-config || command -v pkgconf) || { echo "there is no pkg-config"; exit 77; }
folder=$(dirname "$(find "$work/installed" -name flash_kda.pc)")
# Without quotes, since pkg-config prints several words.
flags=$(PKG_CONFIG_PATH=$folder "$pkg_config" --cflags --libs flash_kda)
libraries=$(PKG_CONFIG_PATH=$folder "$pkg_config" --variable=libdir flash_kda)
"$cc" "$here/outside.c" $flags "-Wl,-rpath,$libraries" -o "$work/with-pkg-config"
[ "$("$work/with-pkg-config")" = "$said" ] || { echo "with pkg-config: not $said"; exit 1; }
echo "with pkg-config: $said"
PKG_CONFIG_PATH=$folder "$pkg_config" --exact-version="${said#flash_kda }" flash_kda
