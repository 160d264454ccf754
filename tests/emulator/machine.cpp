#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <random>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <ucontext.h>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace emulator
{

namespace
{

constexpr size_t STACK_BYTES = 64 << 10;
constexpr int NAMED_BARRIERS = 16, COPIES_IN_FLIGHT = 64;
constexpr int WARPGROUP = 4;         /* warps */
constexpr int MOST_WARPGROUPS = 8;   /* of a block */
constexpr int QUARTERS = 4;          /* of a multiprocessor, which warps are dealt out to in turn */
constexpr int ALL_REGISTERS = 65536; /* of a multiprocessor, and so of a block */
constexpr auto PATIENCE = std::chrono::seconds(60); /* with other blocks */

struct Lane;
struct Barrier {
    int threads;
    unsigned round;
    std::unordered_set<const Lane *> arrived;
};

/* What stands for an mbarrier in its 64 bits. */
struct Mbarrier {
    uint16_t count, missing;
    uint32_t phase : 1;
    int32_t bytes : 31;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t), "as large as the real one");

/* Why a thread does not run. */
enum class Wait { NOTHING, GATHERING, BARRIER, MBARRIER, BLOCKS, KERNEL, REGISTERS };

struct Lane {
    Thread view;
    jmp_buf place;
    unsigned char *stack;
    bool started, done;
    Wait wait;
    const void *on;
    unsigned round; /* of what is waited on; the parity for an mbarrier */
};

struct Warp {
    Lane lane[LANES];
    struct {
        const char *what;
        void *all[LANES];
        int arrived;
        unsigned round;
    } gathering;
    std::vector<uint32_t> unfenced; /* where it wrote, in units of 16 bytes */
    int fenced;                     /* threads, since then */
    bool polls;                     /* has just asked for what was not there yet: others are to go on */
    int registers;                  /* of a thread */
    unsigned changes;               /* of that number, */
    bool has_met;                   /* and whether the warp has met others since the last */
    int slow;                       /* one turn when others have so many, on average */
    std::vector<std::function<void()>> issued;
    std::deque<std::vector<std::function<void()>>> committed;
};

/* A block, or the blocks of a cluster, which take turns as a block's warps do. */
struct Block {
    const std::function<void()> *kernel;
    const std::atomic<bool> *before; /* null, or whether the kernel before is over */
    int cluster;
    unsigned char *shared; /* of all its blocks */
    std::vector<std::unique_ptr<Warp>> warps;
    Barrier barriers[2][NAMED_BARRIERS + 1]; /* and the one of all threads of a block */
    Barrier cluster_barrier;
    int registers[2][QUARTERS];                     /* that no warp has */
    std::vector<int> asked_for[2][MOST_WARPGROUPS]; /* by each warpgroup, one after the other */
    std::vector<std::function<void()>> copies;
    std::vector<uint8_t> unfenced;                            /* of each 16 bytes: by how many stores */
    std::unordered_map<const Mbarrier *, Mbarrier> mbarriers; /* all that there were, as they were left */
    std::mt19937_64 random;
    bool products_at_once;
    jmp_buf scheduler;
    ucontext_t first; /* where new fibers return to: never */

    bool chance(int one_in)
    {
        return random() % static_cast<uint64_t>(one_in) == 0;
    }
};

thread_local Block *block;
thread_local Warp *warp;
thread_local Lane *lane;

bool may_go_on(const Warp &w, const Lane &l)
{
    switch (l.wait) {
    case Wait::NOTHING: return true;
    case Wait::GATHERING: return w.gathering.round != l.round;
    case Wait::BARRIER: return static_cast<const Barrier *>(l.on)->round != l.round;
    case Wait::MBARRIER: return static_cast<const Mbarrier *>(l.on)->phase != l.round;
    case Wait::BLOCKS: return true;
    case Wait::KERNEL: return *static_cast<const std::atomic<bool> *>(l.on);
    case Wait::REGISTERS: return *static_cast<const int *>(l.on) >= static_cast<int>(l.round);
    }
    return false;
}

/* Back to the scheduler, until the condition holds. */
void suspend(Wait wait, const void *on, unsigned round)
{
    lane->wait = wait, lane->on = on, lane->round = round;
    if (wait != Wait::BLOCKS && may_go_on(*warp, *lane)) {
        lane->wait = Wait::NOTHING;
        return;
    }
    if (_setjmp(lane->place) == 0) _longjmp(block->scheduler, 1);
    lane->wait = Wait::NOTHING;
}

void run_kernel()
{
    (*block->kernel)();
    lane->done = true;
    _longjmp(block->scheduler, 1);
}

void resume(Warp &w, Lane &l)
{
    warp = &w, lane = &l;
    if (_setjmp(block->scheduler) != 0) return;
    if (l.started) _longjmp(l.place, 1);
    l.started = true;
    ucontext_t fiber;
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = l.stack;
    fiber.uc_stack.ss_size = STACK_BYTES;
    fiber.uc_link = &block->first;
    makecontext(&fiber, run_kernel, 0);
    setcontext(&fiber);
}

/* Runs the warp's threads, in an order of its own each time, until none can go on. Returns whether any did. */
bool run_warp(Warp &w)
{
    bool any = false;
    for (bool again = true; again;) {
        again = false;
        const int start = static_cast<int>(block->random() % LANES), step = block->chance(2) ? 1 : LANES - 1;
        for (int i = 0; i < LANES; i++) {
            Lane &l = w.lane[(start + i * step) % LANES];
            if (l.done || !may_go_on(w, l)) continue;
            const bool polls = l.wait == Wait::BLOCKS;
            resume(w, l);
            if (!polls || l.wait != Wait::BLOCKS) any = again = true;
        }
        if (w.polls) return false;
    }
    return any;
}

bool could_run(const Warp &w)
{
    return std::any_of(std::begin(w.lane), std::end(w.lane),
                       [&](const Lane &l) { return !l.done && may_go_on(w, l); });
}

/* Memory that holds an mbarrier is not for anything else until it is made invalid, which no kernel here does: even if nobody waits for it
 * any more a multiprocessor may write there. */
void check_untouched(const Mbarrier &b)
{
    const auto known = block->mbarriers.find(&b);
    const ptrdiff_t at = reinterpret_cast<const unsigned char *>(&b) - block->shared;
    if (known == block->mbarriers.end()) fail("no mbarrier was initialised at shared memory + %td", at);
    if (memcmp(&known->second, &b, sizeof b) != 0)
        fail("the mbarrier at shared memory + %td was overwritten", at);
}

[[noreturn]] void report_deadlock()
{
    static const char *const reasons[] = {"nothing",     "a collective", "a named barrier",
                                          "an mbarrier", "other blocks", "the kernel before",
                                          "registers"};
    std::string text;
    for (size_t i = 0; i < block->warps.size(); i++) {
        const Warp &w = *block->warps[i];
        for (int j = 0; j < LANES; j++) {
            const Lane &l = w.lane[j];
            if (l.done || (j && l.wait == w.lane[0].wait && l.on == w.lane[0].on)) continue;
            char line[200];
            snprintf(line, sizeof line,
                     "\n  warp %zu lane %d: %s %s, shared memory + %td, parity or round %u", i, j,
                     reasons[static_cast<int>(l.wait)], l.wait == Wait::GATHERING ? w.gathering.what : "",
                     static_cast<const unsigned char *>(l.on) - l.view.shared, l.round);
            text += line;
        }
    }
    fail("block %u%s can't go on:%s", block->warps[0]->lane[0].view.block.x,
         block->cluster == 2 ? " and the next" : "", text.c_str());
}

void run_block()
{
    std::vector<Warp *> order;
    for (auto &w : block->warps) order.push_back(w.get());
    auto since = std::chrono::steady_clock::now();
    for (;;) {
        bool any = false, done = true, polling = false, late = false;
        std::shuffle(order.begin(), order.end(), block->random);
        for (Warp *w : order) {
            while (!block->copies.empty() && block->chance(4)) { /* one of them lands */
                std::swap(block->copies[block->random() % block->copies.size()], block->copies.back());
                const auto copy = std::move(block->copies.back());
                block->copies.pop_back();
                copy();
                any = true;
            }
            if (block->chance(w->slow))
                any |= run_warp(*w);
            else
                late |= could_run(*w);
            polling |= w->polls;
            for (const Lane &l : w->lane)
                done &= l.done, polling |= !l.done && (l.wait == Wait::BLOCKS || l.wait == Wait::KERNEL);
        }
        if (done) break;
        if (any || (block->before && !*block->before)) since = std::chrono::steady_clock::now();
        if (any || !block->copies.empty()) continue;
        const bool patient = std::chrono::steady_clock::now() - since <= PATIENCE;
        if (late && patient) continue;
        if (!polling || !patient) report_deadlock();
        if (block->before && !*block->before)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        else
            std::this_thread::yield();
    }
    if (!block->copies.empty()) fail("block ended with copies in flight");
    for (const auto &b : block->mbarriers) check_untouched(*b.first);
    for (auto &w : block->warps)
        if (!w->issued.empty() || !w->committed.empty()) fail("a warp ended with products in flight");
}

} // namespace

void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("emulator: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    _Exit(1);
}

const Thread &thread()
{
    return lane->view;
}

void *const *come_last(const char *what, void *mine)
{
    auto &g = warp->gathering;
    if (g.arrived == 0) g.what = what;
    if (strcmp(g.what, what) != 0)
        fail("threads of a warp meet at %s and at %s: thread %u of block %u", g.what, what,
             lane->view.thread.x, lane->view.block.x);
    g.all[lane->view.thread.x % LANES] = mine;
    if (++g.arrived == LANES) return g.all;
    suspend(Wait::GATHERING, nullptr, g.round);
    return nullptr;
}

void let_go()
{
    warp->gathering.arrived = 0;
    warp->gathering.round++;
}

static Barrier &barrier(int id)
{
    if (id < 0 || id > NAMED_BARRIERS) fail("named barrier %d", id);
    return block->barriers[lane->view.rank][id];
}

static Barrier &arrive(Barrier &b, int id, int threads)
{
    if (b.arrived.empty()) b.threads = threads;
    if (b.threads != threads) fail("named barrier %d is for %d threads and for %d", id, b.threads, threads);
    if (!b.arrived.insert(lane).second)
        fail("thread %u of block %u counts twice at named barrier %d, for others who are not there",
             lane->view.thread.x, lane->view.block.x, id);
    if (static_cast<int>(b.arrived.size()) == threads) b.arrived.clear(), b.round++;
    return b;
}

void barrier_sync(int id, int threads)
{
    const unsigned round = barrier(id).round;
    suspend(Wait::BARRIER, &arrive(barrier(id), id, threads), round);
    if (threads >= WARPGROUP * LANES) warp->has_met = true;
}

void barrier_arrive(int id, int threads)
{
    arrive(barrier(id), id, threads);
}

void block_sync()
{
    barrier_sync(NAMED_BARRIERS, static_cast<int>(block->warps.size()) / block->cluster * LANES);
}

void cluster_sync()
{
    const unsigned round = block->cluster_barrier.round;
    suspend(
        Wait::BARRIER,
        &arrive(block->cluster_barrier, NAMED_BARRIERS + 1, static_cast<int>(block->warps.size()) * LANES),
        round);
    warp->has_met = true;
}

void set_registers(int registers, bool more)
{
    gather(more ? "setmaxnreg.inc" : "setmaxnreg.dec", nullptr, [&](void *const *) {
        Warp &w = *warp;
        const unsigned index = lane->view.thread.x / LANES;
        const int rank = lane->view.rank;
        auto &asked_for = block->asked_for[rank][index / WARPGROUP];
        if (asked_for.size() == w.changes) asked_for.push_back(registers);
        if (asked_for[w.changes] != registers)
            fail("warp %u asks for %d registers, another one of its warpgroup for %d", index, registers,
                 asked_for[w.changes]);
        if (w.changes++ && !w.has_met)
            fail("warp %u asks for %d registers after %d without a barrier between", index, registers,
                 w.registers);
        if (more ? registers < w.registers : registers > w.registers)
            fail("setmaxnreg.%s from %d registers to %d", more ? "inc" : "dec", w.registers, registers);
        int &left = block->registers[rank][index % QUARTERS];
        const int wanted = (registers - w.registers) * LANES;
        if (wanted > left) suspend(Wait::REGISTERS, &left, static_cast<unsigned>(wanted));
        left -= wanted;
        w.registers = registers, w.has_met = false;
    });
}

/* One that has been initialised. */
static Mbarrier &of(uint64_t *barrier)
{
    auto &b = *reinterpret_cast<Mbarrier *>(barrier);
    check_untouched(b);
    return b;
}

static void leave(Mbarrier &b)
{
    if (!b.missing && !b.bytes) b.phase ^= 1, b.missing = b.count;
    block->mbarriers[&b] = b;
}

void mbarrier_init(uint64_t *barrier, int count)
{
    auto &b = *reinterpret_cast<Mbarrier *>(barrier);
    b = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0, 0};
    block->mbarriers[&b] = b;
}

void mbarrier_arrive(uint64_t *barrier, int expected_bytes)
{
    Mbarrier &b = of(barrier);
    if (!b.missing)
        fail("too many arrivals at the mbarrier at %td",
             reinterpret_cast<unsigned char *>(barrier) - lane->view.shared);
    b.bytes += expected_bytes;
    b.missing--;
    leave(b);
}

void mbarrier_complete_bytes(uint64_t *barrier, int bytes)
{
    Mbarrier &b = of(barrier);
    b.bytes -= bytes;
    leave(b);
}

void mbarrier_wait(uint64_t *barrier, int parity)
{
    suspend(Wait::MBARRIER, &of(barrier), static_cast<unsigned>(parity) & 1);
}

bool mbarrier_test(const uint64_t *barrier, int parity)
{
    const bool done =
        reinterpret_cast<const Mbarrier *>(barrier)->phase != (static_cast<unsigned>(parity) & 1);
    warp->polls = !done;
    return done;
}

void check_other_cta()
{
    const size_t half = block->warps.size() / 2, first = lane->view.rank ? 0 : half;
    for (size_t i = first; i < first + half; i++)
        for (const Lane &l : block->warps[i]->lane)
            if (!l.done) return;
    fail("block %u reaches for the other block of its cluster, which has ended", lane->view.block.x);
}

static uint32_t unit_of(const unsigned char *at)
{
    return static_cast<uint32_t>((at - block->shared) / 16);
}

void mark_written(const unsigned char *at)
{
    block->unfenced[unit_of(at)]++;
    warp->unfenced.push_back(unit_of(at));
    warp->fenced = 0;
}

void fence_async_proxy()
{
    if (++warp->fenced < LANES) return;
    for (uint32_t unit : warp->unfenced) block->unfenced[unit]--;
    warp->unfenced.clear();
    warp->fenced = 0;
}

void check_fenced(const unsigned char *at, const char *who)
{
    if (block->unfenced[unit_of(at)])
        fail("%s at shared memory + %td before fence.proxy.async by those who wrote there", who,
             at - block->shared);
}

void later(std::function<void()> act)
{
    if (block->copies.size() >= COPIES_IN_FLIGHT) {
        block->copies.front()();
        block->copies.erase(block->copies.begin());
    }
    block->copies.push_back(std::move(act));
}

void issue_product(std::function<void()> act)
{
    if (block->products_at_once) act = (act(), std::function<void()>());
    warp->issued.push_back(std::move(act));
}

void commit_products()
{
    warp->committed.push_back(std::move(warp->issued));
    warp->issued.clear();
}

void wait_for_products(int pending)
{
    for (; warp->committed.size() > static_cast<size_t>(pending); warp->committed.pop_front())
        for (auto &product : warp->committed.front())
            if (product) product();
}

void yield_to_blocks()
{
    suspend(Wait::BLOCKS, nullptr, 0);
}

void wait_for_previous_kernel()
{
    if (block->before) suspend(Wait::KERNEL, block->before, 0);
}

/* One block or cluster after another, on the calling thread of the operating system. */
static void run_blocks(const std::function<void()> &kernel, Dim3 grid, Dim3 dim, unsigned cluster,
                       size_t shared_bytes, uint64_t seed, const std::atomic<bool> *before,
                       std::atomic<unsigned> &next)
{
    constexpr size_t ALIGNMENT = 1024;
    const size_t warps = (dim.x + LANES - 1) / LANES, stacks = cluster * warps * LANES * STACK_BYTES;
    shared_bytes = (shared_bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
    auto *shared = static_cast<unsigned char *>(aligned_alloc(ALIGNMENT, cluster * shared_bytes));
    void *stack =
        mmap(nullptr, stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!shared || stack == MAP_FAILED) fail("no memory for a block");
    for (unsigned id; (id = cluster * next++) < grid.x;) {
        auto now = std::make_unique<Block>();
        block = now.get();
        block->kernel = &kernel;
        block->before = before;
        block->cluster = static_cast<int>(cluster);
        block->shared = shared;
        block->random.seed(seed + id);
        block->products_at_once = block->chance(2);
        block->unfenced.assign(cluster * shared_bytes / 16, 0);
        memset(shared, 0xff, cluster * shared_bytes); /* NaN */
        const bool slow_ones = block->chance(2);
        const bool slow_block = block->chance(4); /* one of a cluster's */
        const size_t slow_rank = block->random() % cluster;
        for (size_t w = 0; w < cluster * warps; w++) {
            const auto rank = static_cast<unsigned>(w / warps);
            const auto bytes = static_cast<ptrdiff_t>(shared_bytes);
            block->warps.push_back(std::make_unique<Warp>());
            block->warps[w]->registers = ALL_REGISTERS / static_cast<int>(warps * LANES);
            block->warps[w]->slow = slow_ones && block->chance(4) ? 2 << block->random() % 5 : 1;
            if (slow_block && rank == slow_rank) block->warps[w]->slow *= 8;
            for (int i = 0; i < LANES; i++) {
                Lane &l = block->warps[w]->lane[i];
                const unsigned index = static_cast<unsigned>(w % warps) * LANES + static_cast<unsigned>(i);
                l.view = {
                    {index, 0, 0},          {id + rank, 0, 0},    dim, grid, shared + rank * shared_bytes,
                    static_cast<int>(rank), rank ? -bytes : bytes};
                l.stack =
                    static_cast<unsigned char *>(stack) + (w * LANES + static_cast<size_t>(i)) * STACK_BYTES;
                l.done = index >= dim.x;
            }
        }
        run_block();
    }
    munmap(stack, stacks);
    free(shared);
}

void launch(const std::function<void()> &kernel, Dim3 grid, Dim3 dim, int cluster, size_t shared_bytes,
            int multiprocessors, uint64_t seed, const std::atomic<bool> *before)
{
    const auto together = static_cast<unsigned>(cluster);
    std::vector<std::thread> running;
    std::atomic<unsigned> next{0};
    for (unsigned i = 0; i < std::min(grid.x, static_cast<unsigned>(multiprocessors)) / together; i++)
        running.emplace_back(
            [&] { run_blocks(kernel, grid, dim, together, shared_bytes, seed, before, next); });
    for (auto &t : running) t.join();
}

} // namespace emulator
