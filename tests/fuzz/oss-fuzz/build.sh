#!/bin/bash -eu
# Builds the harnesses in OSS-Fuzz's container, which sets CC, CFLAGS (with the sanitizers),
# LIB_FUZZING_ENGINE, and OUT, where programs and their corpora go.
cmake -S . -B "$WORK/build" -G Ninja -DFLASH_KDA_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    "-DFLASH_KDA_FUZZ=$LIB_FUZZING_ENGINE" '-DCMAKE_BUILD_RPATH=$ORIGIN'
for name in call bwd decode file command plan; do
    cmake --build "$WORK/build" --target "fuzz_$name"
    cp "$WORK/build/tests/fuzz/fuzz_$name" "$OUT/"
    zip -q -j "$OUT/fuzz_${name}_seed_corpus.zip" tests/fuzz/corpus/"$name"/*
done
cp "$WORK"/build/libflashkda.so.0 "$OUT/"
