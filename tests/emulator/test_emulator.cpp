/*
 * Tests of the emulator itself: small kernels without a mistake, which must be right under all seeds, and
 * these kernels with a mistake, which the emulator must bring to light under some seed.
 */
#include <atomic>
#include <chrono>
#include <initializer_list>
#include <stdio.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#include "instructions.h"

static int failures;

static void check(bool good, const char *what)
{
    if (good) return;
    fprintf(stderr, "FAIL %s\n", what);
    failures++;
}

constexpr int SEEDS = 40;

/* The shared memory of the kernels below, and what they find out. */
struct alignas(1024) Memory {
    unsigned char tile[2048];
    int word[64];
    uint64_t barrier;
};
static Memory &memory()
{
    return *reinterpret_cast<Memory *>(emulator::thread().shared);
}
static int wrong;

/* Under how many of the seeds a kernel with `threads` threads counts something wrong. */
static int wrong_runs(void kernel(), unsigned threads, unsigned cluster = 1)
{
    int count = 0;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        wrong = 0;
        emulator::launch(kernel, {cluster, 1, 1}, {threads, 1, 1}, static_cast<int>(cluster), sizeof(Memory),
                         static_cast<int>(cluster), seed);
        count += wrong > 0;
    }
    return count;
}

/* Each lane reads what its neighbour wrote. */
template <bool sync> static void neighbours()
{
    const unsigned lane = threadIdx.x;
    memory().word[lane] = static_cast<int>(lane);
    if (sync) __syncwarp();
    wrong += memory().word[(lane + 1) % 32] != static_cast<int>((lane + 1) % 32);
}

/* A warp writes; another warp waits in some way, and reads. */
template <void wait()> static void hand_over()
{
    const unsigned lane = threadIdx.x % 32;
    if (threadIdx.x == 0) fkda::mbarrier_init(&memory().barrier, 1);
    __syncthreads();
    if (threadIdx.x < 32) {
        memory().word[lane] = 7;
        fkda::mbarrier_arrive_warp(&memory().barrier);
    } else {
        wait();
        wrong += memory().word[lane] != 7;
    }
}
static void be_woken()
{
    fkda::mbarrier_wait(&memory().barrier, 0);
}
static void ask()
{
    while (!fkda::mbarrier_test(&memory().barrier, 0)) {
    }
}
static void ask_once()
{
    fkda::mbarrier_test(&memory().barrier, 0);
}
static void go_on()
{
}

/* A box comes to shared memory, where its rows are swizzled. */
static uint16_t tensor[16][64];
static fkda_tma_descriptor tensor_descriptor;
template <bool wait> static void copy()
{
    if (threadIdx.x == 0) {
        fkda::mbarrier_init(&memory().barrier, 1);
        fkda::mbarrier_arrive_expecting(&memory().barrier, sizeof memory().tile);
        fkda::copy_box(memory().tile, &tensor_descriptor, 0, 0, 0, 0, &memory().barrier);
    }
    __syncthreads();
    if (wait) fkda::mbarrier_wait(&memory().barrier, 0);
    for (unsigned row = 0; row < 16; row++) {
        const unsigned unit = threadIdx.x % 8;
        uint16_t first;
        memcpy(&first, &memory().tile[row * 128 + (unit ^ row % 8) * 16], sizeof first);
        wrong += first != tensor[row][8 * unit];
    }
    __syncthreads();
    fkda::mbarrier_wait(&memory().barrier, 0); /* nothing may be in flight at the end */
}

/* Bytes come to shared memory as they are. */
template <bool wait> static void copy_plainly()
{
    if (threadIdx.x == 0) {
        fkda::mbarrier_init(&memory().barrier, 1);
        fkda::mbarrier_arrive_expecting(&memory().barrier, sizeof tensor);
        fkda::copy_bulk(memory().tile, tensor, sizeof tensor, &memory().barrier);
    }
    __syncthreads();
    if (wait) fkda::mbarrier_wait(&memory().barrier, 0);
    wrong += memcmp(memory().tile, tensor, sizeof tensor) != 0;
    __syncthreads();
    fkda::mbarrier_wait(&memory().barrier, 0); /* nothing may be in flight at the end */
}

/* d = a b, where a is all ones and b all twos: every element is 32. */
template <bool wait> static void product()
{
    float d[2][4] = {};
    const uint32_t ones = fkda::pack_half(1, 1), a[4] = {ones, ones, ones, ones};
    for (unsigned i = threadIdx.x; i < 256; i += 128) {
        const uint16_t two = fkda::half_from(2.0f);
        memcpy(&memory().tile[2 * i], &two, sizeof two);
    }
    __syncthreads();
    fkda::wgmma<false, false>(d, a, fkda::tile_descriptor<256, 128>(fkda::descriptor_address(memory().tile)));
    fkda::wgmma_commit();
    if (wait) fkda::wgmma_wait<0>();
    for (auto &tile : d)
        for (float x : tile) wrong += x != 32.0f;
    fkda::wgmma_wait<0>();
}

/* Products of fragments, against sums by hand. */
static void fragments()
{
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    const auto a = [](int row, int k) { return static_cast<float>((3 * row + 5 * k) % 7); };
    const auto b = [](int k, int column) { return static_cast<float>((2 * k + column) % 5); };
    const auto a_pair = [&](int row, int k) { return fkda::pack_bf16(a(row, k), a(row, k + 1)); };
    const auto b_pair = [&](int k) { return fkda::pack_bf16(b(k, g), b(k + 1, g)); };
    float d[4] = {}, d32[4] = {};
    fkda::mma_bf16(d, a_pair(g, 2 * t), a_pair(g + 8, 2 * t), a_pair(g, 2 * t + 8), a_pair(g + 8, 2 * t + 8),
                   b_pair(2 * t), b_pair(2 * t + 8));
    for (int k = 0; k < 16; k += 8)
        fkda::mma_tf32(d32, a(g, k + t), a(g + 8, k + t), a(g, k + t + 4), a(g + 8, k + t + 4), b(k + t, g),
                       b(k + t + 4, g));
    for (int r = 0; r < 4; r++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += a(g + r / 2 * 8, k) * b(k, 2 * t + r % 2);
        wrong += d[r] != sum || d32[r] != sum;
    }
}

/* ldmatrix brings back what stmatrix has stored, and brings it transposed if it transposes. */
static void matrices()
{
    const unsigned lane = threadIdx.x;
    const uint32_t at = fkda::shared_address(&memory().tile[16 * lane]);
    const uint32_t mine[4] = {lane, lane + 100, lane + 200, lane + 300};
    uint32_t same[4], back[4];
    fkda::store_matrices(at, mine);
    __syncwarp();
    fkda::load_matrices(same, at);
    fkda::load_matrices_transposed(back, at);
    for (int m = 0; m < 4; m++) wrong += same[m] != mine[m] || fkda::transpose_matrix(back[m]) != mine[m];
    uint16_t first;
    memcpy(&first, &memory().tile[(lane / 4) * 16 + lane % 4 * 4], sizeof first);
    wrong += first != lane;
}

/* A warp asks eight times whether something is done that never is, and relies on it that another warp, which
 * asks once, has gone on by then. */
static void takes_its_time_for_granted()
{
    if (threadIdx.x == 0) fkda::mbarrier_init(&memory().barrier, 2), memory().word[0] = 0;
    __syncthreads();
    const bool first = threadIdx.x < 32;
    for (int i = 0; i < (first ? 8 : 1); i++) fkda::mbarrier_test(&memory().barrier, 0);
    if (first)
        wrong += memory().word[0] != 1;
    else
        memory().word[0] = 1;
    __syncthreads();
}

/* A warp arrives at a named barrier without waiting, and then comes to a barrier a second time: to number 2
 * as everybody, or to number 1 again, where the other warp may still be waiting. */
template <int next> static void passes_without_waiting()
{
    if (threadIdx.x < 32)
        fkda::barrier_arrive<1, 64>(0);
    else
        fkda::barrier_sync<1, 64>(0);
    fkda::barrier_sync<next, 64>(0);
}

/* Whether a kernel that cannot end ends the program with status 1. */
static bool ends_the_program(void kernel(), unsigned threads, unsigned cluster = 1)
{
    const pid_t child = fork();
    int status = 0;
    if (child == 0) {
        fclose(stderr);
        emulator::launch(kernel, {cluster, 1, 1}, {threads, 1, 1}, static_cast<int>(cluster), sizeof(Memory),
                         static_cast<int>(cluster), 1);
        _exit(0);
    }
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

static void waits_in_vain()
{
    if (threadIdx.x == 0) fkda::mbarrier_init(&memory().barrier, 2);
    __syncthreads();
    fkda::mbarrier_arrive_warp(&memory().barrier);
    fkda::mbarrier_wait(&memory().barrier, 0);
}

/* A wait that ends in a trap: nobody arrives, or somebody does. */
template <bool in_vain> static void waits_with_a_bound()
{
    if (threadIdx.x == 0) fkda::mbarrier_init(&memory().barrier, 1);
    __syncthreads();
    if (threadIdx.x < 32)
        fkda::mbarrier_wait_or_give_up(&memory().barrier, 0);
    else if (!in_vain)
        fkda::mbarrier_arrive_warp(&memory().barrier);
}
/* A warp waits without a bound, and another warp gives up. */
static void is_watched()
{
    if (threadIdx.x == 0) fkda::mbarrier_init(&memory().barrier, 1);
    __syncthreads();
    if (threadIdx.x < 32)
        fkda::mbarrier_wait_or_give_up(&memory().barrier, 0);
    else
        fkda::mbarrier_wait(&memory().barrier, 0);
}
static bool traps(void kernel(), unsigned cluster = 1)
{
    return !emulator::launch(kernel, {2 * cluster, 1, 1}, {64, 1, 1}, static_cast<int>(cluster),
                             sizeof(Memory), static_cast<int>(2 * cluster), 1);
}

/* Of four warpgroups with 128 registers for each thread, the first gives registers twice, and the second one
 * takes as many as the first one gives, or more. */
template <int taken, bool meet> static void change_registers()
{
    if (threadIdx.x >= 256) return;
    if (threadIdx.x >= 128) return fkda::take_registers<taken>();
    fkda::give_registers<112>();
    if (meet) fkda::barrier_sync<1, 128>(0);
    fkda::give_registers<96>();
}

/* The warps of a warpgroup ask for different numbers of registers. */
static void disagree_about_registers()
{
    if (threadIdx.x < 64)
        fkda::give_registers<104>();
    else
        fkda::give_registers<96>();
}

static void parts_ways()
{
    if (threadIdx.x < 16)
        __syncwarp();
    else
        __any_sync(~0u, 0);
}

static void leaves_early()
{
    if (threadIdx.x < 16) __syncwarp();
}

/* A product's operand is what stmatrix has stored. */
template <bool fence> static void stored_operand()
{
    float d[2][4] = {};
    const uint32_t ones = fkda::pack_half(1, 1), a[4] = {ones, ones, ones, ones};
    fkda::store_matrices(fkda::shared_address(&memory().tile[16 * threadIdx.x]), a);
    if (fence) fkda::fence_async_proxy();
    __syncthreads();
    fkda::wgmma<false, false>(d, a, fkda::tile_descriptor<256, 128>(fkda::descriptor_address(memory().tile)));
    fkda::wgmma_commit();
    fkda::wgmma_wait<0>();
    wrong += d[1][3] != 16.0f;
}

/* A CTA sends numbers to the other one, and may change them once the other one has answered. */
template <bool wait_for_copy, bool wait_for_answer> static void send()
{
    const unsigned lane = threadIdx.x;
    const int rank = fkda::cluster_rank();
    uint64_t *answered = reinterpret_cast<uint64_t *>(memory().tile);
    memory().word[lane] = rank ? 0 : 5;
    if (lane == 0) fkda::mbarrier_init(&memory().barrier, 1);
    if (lane == 0) fkda::mbarrier_init(answered, 1);
    __syncthreads();
    fkda::cluster_sync();
    if (rank == 0) {
        if (lane == 0) fkda::copy_to_other_cta(memory().word, memory().word, 128, &memory().barrier);
        if (wait_for_answer) fkda::mbarrier_wait(answered, 0);
        memory().word[lane] = 6;
    } else {
        if (lane == 0) fkda::mbarrier_arrive_expecting(&memory().barrier, 128);
        if (wait_for_copy) fkda::mbarrier_wait(&memory().barrier, 0);
        wrong += memory().word[lane] != 5;
        fkda::mbarrier_wait(&memory().barrier, 0);
        fkda::mbarrier_arrive_warp_in_other_cta(answered);
    }
    __syncwarp();
    fkda::cluster_sync();
}

/* A CTA answers the other one, which may have ended. */
template <bool wait> static void answer()
{
    uint64_t *answered = reinterpret_cast<uint64_t *>(memory().tile);
    if (threadIdx.x == 0) fkda::mbarrier_init(answered, 1);
    __syncthreads();
    fkda::cluster_sync();
    if (fkda::cluster_rank()) {
        for (int i = 0; i < 100; i++) __syncwarp();
        fkda::mbarrier_arrive_warp_in_other_cta(answered);
    }
    if (wait) fkda::cluster_sync();
}

/* The second CTA sets a flag once its number is in global memory; the first CTA waits for the flag. */
static int number, flag;
static void pass_on()
{
    if (blockIdx.x == 1) {
        if (threadIdx.x == 31) number = 9;
        fkda::set_flag(&flag);
    } else {
        fkda::await_flag(&flag);
        wrong += number != 9;
    }
}
static bool passes_on()
{
    wrong = number = flag = 0;
    emulator::launch(pass_on, {2, 1, 1}, {32, 1, 1}, 1, sizeof(Memory), 2, 1);
    return wrong == 0;
}

/* Of two kernels the second one is launched early, and reads what the first one writes after a while. */
template <bool wait> static void reads_what_the_previous_kernel_left()
{
    if (wait) fkda::wait_for_previous_kernel();
    wrong += number != 9;
}
static bool waits_for_previous_kernel(void second())
{
    std::atomic<bool> over{false};
    wrong = number = 0;
    const auto run = [](void kernel(), const std::atomic<bool> *before) {
        emulator::launch(kernel, {1, 1, 1}, {1, 1, 1}, 1, sizeof(Memory), 1, 1, before);
    };
    std::thread first([&] {
        run(
            [] {
                std::this_thread::sleep_for(std::chrono::milliseconds(20));
                number = 9;
            },
            nullptr);
        over = true;
    });
    run(second, &over);
    first.join();
    return wrong == 0;
}

/* Memory beside an mbarrier, or of the mbarrier itself, is used for something else once nobody needs the
 * mbarrier. */
template <bool apart> static void reuse()
{
    hand_over<be_woken>();
    __syncthreads();
    if (threadIdx.x == 0) (apart ? memory().word[0] : *reinterpret_cast<int *>(&memory().barrier)) = 5;
}

/* Lanes call uniform() with numbers that differ. */
static void differ()
{
    fkda::uniform(static_cast<int>(threadIdx.x));
}

/* Products of pairs of fp16, each rounded by itself, and the larger ones of pairs of integers. */
static void pairs()
{
    check(fkda::max_of_pairs(0x00018000, 0x00027fff) == 0x00028000, "the larger of pairs");
    const uint32_t x = fkda::pack_half(1.5f, -0.25f), y = fkda::pack_half(3.0f, 0x1p-14f);
    check(fkda::multiply_halves(x, y) == fkda::pack_half(4.5f, -0x1p-16f), "products of pairs of fp16");
}

/* Addresses in a cluster hold the rank of the CTA above bit 24, and descriptors must not. */
static void addresses()
{
    const uint32_t address = fkda::shared_address(memory().word);
    wrong += address >> 24 != static_cast<uint32_t>(fkda::cluster_rank());
    wrong += fkda::descriptor_address(memory().word) != (address & 0xffffff) / 16;
    wrong += blockIdx.x != static_cast<unsigned>(fkda::cluster_rank());
}

static void conversions()
{
    bool good = true;
    for (uint32_t x = 0; x < 0x10000; x++) {
        const float half = fkda::from_half(static_cast<uint16_t>(x));
        if (half == half) good &= fkda::half_from(half) == x;
        const float bf16 = fkda::from_bf16(static_cast<uint16_t>(x));
        if (bf16 == bf16) good &= fkda::bf16_from(bf16) == x;
    }
    good &= fkda::half_from(2049.0f) == fkda::half_from(2048.0f) &&
            fkda::half_from(2051.0f) == fkda::half_from(2052.0f);
    good &= fkda::half_from(65519.0f) == 0x7bff && fkda::half_from(-65520.0f) == 0xfc00;
    good &= fkda::half_from(0x1p-25f) == 0 && fkda::half_from(0x1.8p-25f) == 1;
    good &= fkda::bf16_from(1.00390625f) == 0x3f80 && fkda::bf16_from(1.01171875f) == 0x3f82;
    check(good, "conversions of 16-bit numbers");
}

int main()
{
    check(traps(waits_with_a_bound<true>) && traps(waits_with_a_bound<true>, 2), "a wait in vain traps");
    check(!traps(waits_with_a_bound<false>), "no trap, although there was one before");
    check(traps(is_watched), "a trap of one warp ends the other ones");
    for (unsigned row = 0; row < 16; row++)
        for (unsigned i = 0; i < 64; i++) tensor[row][i] = static_cast<uint16_t>(64 * row + i);
    emulator::Descriptor descriptor = {
        reinterpret_cast<const unsigned char *>(tensor), {64, 16, 1, 1}, {128, 128, 128}, {64, 16, 1, 1}};
    memcpy(tensor_descriptor.opaque, &descriptor, sizeof descriptor);

    conversions();
    pairs();
    check(wrong_runs(neighbours<true>, 32) == 0, "lanes meet");
    check(wrong_runs(neighbours<false>, 32) > 0, "lanes that don't meet are found");
    check(wrong_runs(hand_over<be_woken>, 64) == 0, "a warp waits for another");
    check(wrong_runs(hand_over<go_on>, 64) > 0, "a warp that doesn't wait is found");
    check(wrong_runs(copy<true>, 64) == 0, "a copy is waited for");
    check(wrong_runs(copy<false>, 64) > 0, "a copy that isn't waited for is found");
    check(wrong_runs(copy_plainly<true>, 64) == 0, "a copy of bytes is waited for");
    check(wrong_runs(copy_plainly<false>, 64) > 0, "a copy of bytes that isn't waited for is found");
    check(wrong_runs(product<true>, 128) == 0, "a product is waited for");
    check(wrong_runs(product<false>, 128) > 0, "a product that isn't waited for is found");
    check(wrong_runs(fragments, 32) == 0, "products of fragments");
    check(wrong_runs(matrices, 32) == 0, "matrices of 8 x 8");
    check(wrong_runs(stored_operand<true>, 32) == 0, "an operand by stmatrix");
    check(ends_the_program(stored_operand<false>, 32), "an operand by stmatrix without a fence");
    check(wrong_runs(hand_over<ask>, 64) == 0, "a warp asks until another is done");
    check(wrong_runs(hand_over<ask_once>, 64) > 0, "a warp that asks and does not heed the answer is found");
    check(wrong_runs(takes_its_time_for_granted, 64) > 0, "a warp that takes another to be fast is found");
    check(wrong_runs(passes_without_waiting<2>, 64) == 0, "two named barriers");
    check(ends_the_program(passes_without_waiting<1>, 64),
          "a warp that counts twice at a named barrier is found");
    check(passes_on(), "a CTA waits for a flag of another CTA");
    check(waits_for_previous_kernel(reads_what_the_previous_kernel_left<true>),
          "a kernel waits for the previous one");
    check(!waits_for_previous_kernel(reads_what_the_previous_kernel_left<false>),
          "a kernel that doesn't wait for the previous one is found");
    check(wrong_runs(addresses, 32, 2) == 0, "addresses in a cluster");
    check(wrong_runs(send<true, true>, 32, 2) == 0, "a copy to the other CTA is waited for");
    check(wrong_runs(send<false, true>, 32, 2) > 0, "a copy to the other CTA that isn't waited for is found");
    check(wrong_runs(send<true, false>, 32, 2) > 0, "numbers that are changed while they are sent are found");
    check(wrong_runs(answer<true>, 32, 2) == 0, "a CTA waits for the other one's end");
    check(ends_the_program(answer<false>, 32, 2), "a CTA that reaches for one that has ended");
    check(ends_the_program(waits_in_vain, 32), "an mbarrier nobody completes");
    check(wrong_runs(reuse<true>, 64) == 0, "memory beside an mbarrier");
    check(ends_the_program(reuse<false>, 64), "an mbarrier that becomes data");
    check(wrong_runs(change_registers<160, true>, 512) == 0, "registers go from one to another");
    check(ends_the_program(change_registers<168, true>, 512), "more registers than there are");
    check(ends_the_program(change_registers<160, false>, 512), "registers changed twice without a barrier");
    check(ends_the_program(disagree_about_registers, 128), "a warpgroup that asks for different registers");
    check(ends_the_program(parts_ways, 32), "lanes at different instructions");
    check(ends_the_program(differ, 32), "lanes that differ where they should not");
    check(ends_the_program(leaves_early, 32), "lanes that never come");
    if (!failures) printf("the emulator finds what it should\n");
    return failures > 0;
}
