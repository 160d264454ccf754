#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#ifndef __x86_64__
#include <ucontext.h>
#endif
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace emulator
{

namespace
{

/* How a fiber stops and another one goes on, which is a large part of what the emulator does. Each change is
 * a call that returns on another stack. The threads of a warp stop at one place, so the processor guesses
 * right where the return goes, which it cannot do for jumps. No fiber changes how floating-point numbers are
 * rounded. The compiler must know nothing of the inside, or what a caller has in registers would be lost. */
#ifdef __clang__
#define OPAQUE __attribute__((noinline))
#else
#define OPAQUE __attribute__((noipa))
#endif
#ifdef __x86_64__
using Place = void *; /* the top of a stack, on which the registers lie that a function keeps */
OPAQUE __attribute__((naked)) void change_places(Place *, const Place *) /* leave, and go on */
{
    asm("push %rbp\n\tpush %rbx\n\tpush %r12\n\tpush %r13\n\tpush %r14\n\tpush %r15\n\t"
        "mov %rsp, (%rdi)\n\tmov (%rsi), %rsp\n\t"
        "pop %r15\n\tpop %r14\n\tpop %r13\n\tpop %r12\n\tpop %rbx\n\tpop %rbp\n\tret");
}
void set_place(Place &place, unsigned char *stack, size_t bytes, void run())
{
    constexpr size_t KEPT = 6; /* registers; above them lie the address of run and that of its caller */
    auto **top = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(stack) + bytes) & -size_t{16}) - 2;
    top[0] = reinterpret_cast<void *>(run), top[1] = nullptr;
    place = top - KEPT;
}
#else
using Place = ucontext_t;
void change_places(Place *leave, const Place *go_on)
{
    swapcontext(leave, go_on);
}
void set_place(Place &place, unsigned char *stack, size_t bytes, void run())
{
    getcontext(&place);
    place.uc_stack.ss_sp = stack, place.uc_stack.ss_size = bytes, place.uc_link = nullptr;
    makecontext(&place, run, 0);
}
#endif

/* Of a thread. A power of two would put the tops of all stacks into the same few lines of the caches. */
constexpr size_t STACK_BYTES = (64 << 10) + 9 * 64;
constexpr int NAMED_BARRIERS = 16, COPIES_IN_FLIGHT = 64;
constexpr int WARPGROUP = 4;         /* warps */
constexpr int MOST_WARPGROUPS = 8;   /* of a CTA */
constexpr int QUARTERS = 4;          /* of an SM; a CTA's warps are assigned to them in turn */
constexpr int ALL_REGISTERS = 65536; /* of an SM, and so of a CTA */
/* Rounds in which a cluster gives every warp a turn in vain before it counts as standing still. The slowest
 * warps get one turn in 256 rounds, so practically all have had one by then. */
constexpr unsigned ROUNDS_IN_VAIN = 10000;
/* A round in vain leaves the processor to other threads, which on a busy machine takes milliseconds. After
 * HASTY_ROUNDS only one in PATIENT_ROUNDS does, so that a standstill is found in seconds there, too. */
constexpr unsigned HASTY_ROUNDS = 100, PATIENT_ROUNDS = 32;

struct Lane;
struct Barrier {
    int threads;
    unsigned round;
    std::unordered_set<const Lane *> arrived;
};

/* The emulator's own mbarrier, in the 64 bits of a real one. */
struct Mbarrier {
    uint16_t count, missing;
    uint32_t phase : 1;
    int32_t bytes : 31;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t), "as large as the real one");

/* Why a thread does not run. */
enum class Wait { NOTHING, GATHERING, BARRIER, MBARRIER, CTAS, KERNEL, REGISTERS, TRAPPED };

struct Lane {
    bool done;
    Wait wait;
    const void *on;
    unsigned round;         /* the round of `on` that the thread waits for; for an mbarrier the parity */
    unsigned cluster_round; /* the round of the cluster's barrier at which the thread has arrived */
    Place place;
    Thread view;
};

struct Warp {
    Lane lane[LANES];
    struct {
        const char *what;
        void *all[LANES];
        int arrived;
        unsigned round;
    } gathering;
    std::vector<uint32_t> unfenced; /* where the warp wrote without a fence since, in units of 16 bytes */
    int fenced;                     /* threads that have called the fence since then */
    int first, step, turns;         /* this time the threads' turns begin with `first`; so many had theirs */
    bool moved;                     /* a thread has gone on in these turns */
    bool waited_for_ctas;           /* the thread whose turn it is had left its last one to other CTAs */
    bool polls;                     /* the warp has just asked in vain whether something is done */
    int registers;                  /* of a thread */
    unsigned changes;               /* how often `registers` has changed */
    bool has_met;                   /* the warp has met other warps since the last change */
    int slow;                       /* the warp gets one turn in this many, on average */
    std::vector<std::function<void()>> issued;
    std::deque<std::vector<std::function<void()>>> committed;
};

/* The one or two CTAs of a cluster. The warps of both take turns. */
struct Cluster {
    const std::function<void()> *kernel;
    const std::atomic<bool> *before; /* null, or whether the previous kernel is over */
    int ctas;
    unsigned char *shared; /* memory of all its CTAs */
    std::vector<std::unique_ptr<Warp>> warps;
    Barrier barriers[2][NAMED_BARRIERS + 1]; /* the last one is __syncthreads */
    Barrier cluster_barrier;
    int registers[2][QUARTERS];                     /* free ones of each CTA and quarter */
    std::vector<int> asked_for[2][MOST_WARPGROUPS]; /* numbers that each warpgroup has asked for */
    std::vector<std::function<void()>> copies;
    std::vector<uint8_t> unfenced; /* for each 16 bytes, the stores without a fence */
    std::unordered_map<const Mbarrier *, Mbarrier> mbarriers; /* all of them, as their last use left them */
    std::mt19937_64 random;
    bool products_immediate;
    Place scheduler;

    bool chance(int one_in)
    {
        return random() % static_cast<uint64_t>(one_in) == 0;
    }
};

thread_local Cluster *cluster;
thread_local Warp *warp;
thread_local Lane *lane;

/*
 * Deadlocks between clusters. A CTA that waits for a flag in global memory cannot see whether anybody will
 * set it. The emulator counts every step that any warp of any cluster takes. If no step is counted any more,
 * and every cluster that runs has given all its warps turns in vain since the last step, then nobody will
 * ever take a step. No clock is asked, so a busy machine makes tests slow and never makes them fail.
 *
 * Then waits that end in a trap are over: patience_is_over is set, and whoever waits so traps. If nothing has
 * moved a second time, nobody waits so, and a GPU would hang for ever. After a trap all runners stop. What
 * they leave behind counts again once the last one has stopped.
 */
std::atomic<uint64_t> steps{0};
std::atomic<bool> patience_is_over{false}, trapped{false};

/* One thread of the operating system that runs clusters. */
struct Runner {
    static constexpr uint64_t MOVING = ~uint64_t{0};
    std::atomic<uint64_t> stands_still_at{
        MOVING}; /* the value of `steps` since which nothing here can move */
};
std::mutex runners_lock;
std::vector<std::shared_ptr<Runner>> runners;
thread_local Runner *runner;

bool all_stand_still(uint64_t at)
{
    const std::lock_guard<std::mutex> guard(runners_lock);
    return steps == at && std::all_of(runners.begin(), runners.end(),
                                      [&](const auto &r) { return r->stands_still_at == at; });
}

inline bool may_go_on(const Warp &w, const Lane &l)
{
    switch (l.wait) {
    case Wait::NOTHING: return true;
    case Wait::GATHERING: return w.gathering.round != l.round;
    case Wait::BARRIER: return static_cast<const Barrier *>(l.on)->round != l.round;
    case Wait::MBARRIER: return static_cast<const Mbarrier *>(l.on)->phase != l.round;
    case Wait::CTAS: return true;
    case Wait::KERNEL: return *static_cast<const std::atomic<bool> *>(l.on);
    case Wait::REGISTERS: return *static_cast<const int *>(l.on) >= static_cast<int>(l.round);
    case Wait::TRAPPED: return false;
    }
    return false;
}

/* Gives the warp's next thread that may go on its turn. Without one the scheduler goes on. */
void give_turn(Warp &w, Place *leave)
{
    while (w.turns < LANES) {
        Lane &l = w.lane[(w.first + w.turns++ * w.step) % LANES];
        if (l.done || !may_go_on(w, l)) continue;
        w.waited_for_ctas = l.wait == Wait::CTAS;
        lane = &l;
        change_places(leave, &l.place);
        return;
    }
    if (leave != &cluster->scheduler) change_places(leave, &cluster->scheduler);
}

/* Lets others go on until the thread may. */
void suspend(Wait wait, const void *on, unsigned round)
{
    Lane &own = *lane;
    own.wait = wait, own.on = on, own.round = round;
    if (wait == Wait::CTAS || !may_go_on(*warp, own)) {
        warp->moved |= !(warp->waited_for_ctas && wait == Wait::CTAS);
        give_turn(*warp, &own.place);
    }
    own.wait = Wait::NOTHING;
}

void run_kernel()
{
    (*cluster->kernel)();
    lane->done = warp->moved = true;
    give_turn(*warp, &lane->place);
}

/* Runs the warp's threads, each time in another order, until none can go on. Returns whether any of them has
 * gone on. */
bool run_warp(Warp &w)
{
    bool any = false;
    warp = &w;
    w.polls = false;
    do {
        w.first = static_cast<int>(cluster->random() % LANES), w.step = cluster->chance(2) ? 1 : LANES - 1;
        w.turns = 0, w.moved = false;
        give_turn(w, &cluster->scheduler);
        any |= w.moved;
        if (w.polls) return false;
    } while (w.moved);
    return any;
}

bool could_run(const Warp &w)
{
    return std::any_of(std::begin(w.lane), std::end(w.lane),
                       [&](const Lane &l) { return !l.done && may_go_on(w, l); });
}

/* Memory that holds an mbarrier may not be used for anything else until the mbarrier is made invalid, which
 * no kernel here does: an SM may still write there, even if nobody waits for the mbarrier any more. */
void check_untouched(const Mbarrier &b)
{
    const auto known = cluster->mbarriers.find(&b);
    const ptrdiff_t at = reinterpret_cast<const unsigned char *>(&b) - cluster->shared;
    if (known == cluster->mbarriers.end()) fail("no mbarrier was initialised at shared memory + %td", at);
    if (memcmp(&known->second, &b, sizeof b) != 0)
        fail("the mbarrier at shared memory + %td was overwritten", at);
}

[[noreturn]] void report_deadlock()
{
    static const char *const reasons[] = {"nothing",     "a collective",         "a named barrier",
                                          "an mbarrier", "other CTAs",           "the previous kernel",
                                          "registers",   "nothing, after a trap"};
    std::string text;
    for (size_t i = 0; i < cluster->warps.size(); i++) {
        const Warp &w = *cluster->warps[i];
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
    fail("CTA %u%s can't go on:%s", cluster->warps[0]->lane[0].view.block.x,
         cluster->ctas == 2 ? " and the next" : "", text.c_str());
}

/* Returns false after a trap. */
bool run_cluster()
{
    std::vector<Warp *> order;
    for (auto &w : cluster->warps) order.push_back(w.get());
    uint64_t last_step = steps;
    unsigned in_vain = 0; /* rounds since the last step of any cluster */
    runner->stands_still_at = Runner::MOVING;
    for (;;) {
        bool any = false, done = true, polling = false, late = false;
        if (trapped) return false;
        std::shuffle(order.begin(), order.end(), cluster->random);
        for (Warp *w : order) {
            while (!cluster->copies.empty() && cluster->chance(4)) { /* a copy lands */
                std::swap(cluster->copies[cluster->random() % cluster->copies.size()],
                          cluster->copies.back());
                const auto copy = std::move(cluster->copies.back());
                cluster->copies.pop_back();
                copy();
                any = true;
            }
            if (cluster->chance(w->slow))
                any |= run_warp(*w);
            else
                late |= could_run(*w);
            polling |= w->polls;
            for (const Lane &l : w->lane)
                done &= l.done, polling |= !l.done && (l.wait == Wait::CTAS || l.wait == Wait::KERNEL);
        }
        if (trapped) return false;
        if (done) break;
        if (any) steps++;
        if (any || !cluster->copies.empty()) continue;
        if (!late && !polling) report_deadlock();
        if (steps != last_step) last_step = steps, in_vain = 0;
        if (++in_vain >= ROUNDS_IN_VAIN) {
            runner->stands_still_at = last_step;
            uint64_t now = last_step;
            /* Of all runners that come here, one counts a step, after which all begin to look anew. */
            if (all_stand_still(last_step) && !trapped && steps.compare_exchange_strong(now, now + 1) &&
                patience_is_over.exchange(true))
                report_deadlock();
        }
        if (late) continue;
        if (cluster->before && !*cluster->before)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        else if (in_vain < HASTY_ROUNDS || in_vain % PATIENT_ROUNDS == 0)
            std::this_thread::yield();
    }
    steps++;
    runner->stands_still_at = Runner::MOVING;
    if (!cluster->copies.empty()) fail("a CTA ended with copies in flight");
    for (const auto &b : cluster->mbarriers) check_untouched(*b.first);
    for (auto &w : cluster->warps)
        if (!w->issued.empty() || !w->committed.empty()) fail("a warp ended with products in flight");
    return true;
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

void trap()
{
    trapped = true;
    suspend(Wait::TRAPPED, nullptr, 0);
    fail("a thread goes on after a trap");
}

bool out_of_patience()
{
    return patience_is_over;
}

void count_step()
{
    steps++;
}

const Thread &thread()
{
    return lane->view;
}

void *const *come_last(const char *what, void *mine)
{
    auto &g = warp->gathering;
    if (g.arrived == 0) g.what = what;
    if (g.what != what && strcmp(g.what, what) != 0)
        fail("threads of a warp meet at %s and at %s: thread %u of CTA %u", g.what, what, lane->view.thread.x,
             lane->view.block.x);
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
    return cluster->barriers[lane->view.rank][id];
}

static Barrier &arrive(Barrier &b, int id, int threads)
{
    if (b.arrived.empty()) b.threads = threads;
    if (b.threads != threads) fail("named barrier %d is for %d threads and for %d", id, b.threads, threads);
    if (!b.arrived.insert(lane).second)
        fail("thread %u of CTA %u counts twice at named barrier %d, for another thread that is not there",
             lane->view.thread.x, lane->view.block.x, id);
    if (static_cast<int>(b.arrived.size()) == threads) b.arrived.clear(), b.round++, count_step();
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

void cta_sync()
{
    barrier_sync(NAMED_BARRIERS, static_cast<int>(cluster->warps.size()) / cluster->ctas * LANES);
}

void cluster_arrive()
{
    lane->cluster_round = cluster->cluster_barrier.round;
    arrive(cluster->cluster_barrier, NAMED_BARRIERS + 1, static_cast<int>(cluster->warps.size()) * LANES);
}

void cluster_wait()
{
    suspend(Wait::BARRIER, &cluster->cluster_barrier, lane->cluster_round);
    warp->has_met = true;
}

void set_registers(int registers, bool more)
{
    gather(more ? "setmaxnreg.inc" : "setmaxnreg.dec", nullptr, [&](void *const *) {
        Warp &w = *warp;
        const unsigned index = lane->view.thread.x / LANES;
        const int rank = lane->view.rank;
        auto &asked_for = cluster->asked_for[rank][index / WARPGROUP];
        if (asked_for.size() == w.changes) asked_for.push_back(registers);
        if (asked_for[w.changes] != registers)
            fail("warp %u asks for %d registers, another one of its warpgroup for %d", index, registers,
                 asked_for[w.changes]);
        if (w.changes++ && !w.has_met)
            fail("warp %u asks for %d registers after %d without a barrier between", index, registers,
                 w.registers);
        if (more ? registers < w.registers : registers > w.registers)
            fail("setmaxnreg.%s from %d registers to %d", more ? "inc" : "dec", w.registers, registers);
        int &left = cluster->registers[rank][index % QUARTERS];
        const int wanted = (registers - w.registers) * LANES;
        if (wanted > left) suspend(Wait::REGISTERS, &left, static_cast<unsigned>(wanted));
        left -= wanted;
        w.registers = registers, w.has_met = false;
    });
}

/* The mbarrier, which must have been initialised. */
static Mbarrier &of(uint64_t *barrier)
{
    auto &b = *reinterpret_cast<Mbarrier *>(barrier);
    check_untouched(b);
    return b;
}

static void leave(Mbarrier &b)
{
    if (!b.missing && !b.bytes) b.phase ^= 1, b.missing = b.count, count_step();
    cluster->mbarriers[&b] = b;
}

void mbarrier_init(uint64_t *barrier, int count)
{
    auto &b = *reinterpret_cast<Mbarrier *>(barrier);
    b = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0, 0};
    cluster->mbarriers[&b] = b;
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
    const size_t half = cluster->warps.size() / 2, first = lane->view.rank ? 0 : half;
    for (size_t i = first; i < first + half; i++)
        for (const Lane &l : cluster->warps[i]->lane)
            if (!l.done) return;
    fail("CTA %u reaches for the other CTA of its cluster, which has ended", lane->view.block.x);
}

static uint32_t unit_of(const unsigned char *at)
{
    return static_cast<uint32_t>((at - cluster->shared) / 16);
}

void mark_written(const unsigned char *at)
{
    cluster->unfenced[unit_of(at)]++;
    warp->unfenced.push_back(unit_of(at));
    warp->fenced = 0;
}

void fence_async_proxy()
{
    if (++warp->fenced < LANES) return;
    for (uint32_t unit : warp->unfenced) cluster->unfenced[unit]--;
    warp->unfenced.clear();
    warp->fenced = 0;
}

void check_fenced(const unsigned char *at, const char *who)
{
    if (cluster->unfenced[unit_of(at)])
        fail("%s at shared memory + %td before fence.proxy.async by those who wrote there", who,
             at - cluster->shared);
}

void later(std::function<void()> act)
{
    if (cluster->copies.size() >= COPIES_IN_FLIGHT) {
        cluster->copies.front()();
        cluster->copies.erase(cluster->copies.begin());
    }
    cluster->copies.push_back(std::move(act));
}

void issue_product(std::function<void()> act)
{
    if (cluster->products_immediate) act = (act(), std::function<void()>());
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

void yield_to_ctas()
{
    suspend(Wait::CTAS, nullptr, 0);
}

void wait_for_previous_kernel()
{
    if (cluster->before) suspend(Wait::KERNEL, cluster->before, 0);
}

/* Runs one cluster after the other, on the calling thread of the operating system. */
static void run_clusters(const std::function<void()> &kernel, Dim3 grid, Dim3 dim, unsigned ctas,
                         size_t shared_bytes, uint64_t seed, const std::atomic<bool> *before,
                         std::atomic<unsigned> &next, std::shared_ptr<Runner> own, std::atomic<bool> &whole)
{
    runner = own.get();
    constexpr size_t ALIGNMENT = 1024;
    const size_t warps = (dim.x + LANES - 1) / LANES, stacks = ctas * warps * LANES * STACK_BYTES;
    shared_bytes = (shared_bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
    auto *shared = static_cast<unsigned char *>(aligned_alloc(ALIGNMENT, ctas * shared_bytes));
    void *stack =
        mmap(nullptr, stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!shared || stack == MAP_FAILED) fail("no memory for a CTA");
    for (unsigned id; (id = ctas * next++) < grid.x;) {
        auto now = std::make_unique<Cluster>();
        cluster = now.get();
        cluster->kernel = &kernel;
        cluster->before = before;
        cluster->ctas = static_cast<int>(ctas);
        cluster->shared = shared;
        cluster->random.seed(seed + id);
        cluster->products_immediate = cluster->chance(2);
        cluster->unfenced.assign(ctas * shared_bytes / 16, 0);
        memset(shared, 0xff, ctas * shared_bytes); /* NaN */
        const bool slow_ones = cluster->chance(2);
        const bool slow_cta = cluster->chance(4); /* of a cluster */
        const size_t slow_rank = cluster->random() % ctas;
        for (size_t w = 0; w < ctas * warps; w++) {
            const auto rank = static_cast<unsigned>(w / warps);
            const auto bytes = static_cast<ptrdiff_t>(shared_bytes);
            cluster->warps.push_back(std::make_unique<Warp>());
            cluster->warps[w]->registers = ALL_REGISTERS / static_cast<int>(warps * LANES);
            cluster->warps[w]->slow = slow_ones && cluster->chance(4) ? 2 << cluster->random() % 5 : 1;
            if (slow_cta && rank == slow_rank) cluster->warps[w]->slow *= 8;
            for (int i = 0; i < LANES; i++) {
                Lane &l = cluster->warps[w]->lane[i];
                const unsigned index = static_cast<unsigned>(w % warps) * LANES + static_cast<unsigned>(i);
                l.view = {
                    {index, 0, 0},          {id + rank, 0, 0},    dim, grid, shared + rank * shared_bytes,
                    static_cast<int>(rank), rank ? -bytes : bytes};
                set_place(l.place,
                          static_cast<unsigned char *>(stack) +
                              (w * LANES + static_cast<size_t>(i)) * STACK_BYTES,
                          STACK_BYTES, run_kernel);
                l.done = index >= dim.x;
            }
        }
        if (run_cluster()) continue;
        whole = false;
        break;
    }
    munmap(stack, stacks);
    free(shared);
    const std::lock_guard<std::mutex> guard(runners_lock);
    runners.erase(std::find(runners.begin(), runners.end(), own));
    if (runners.empty()) patience_is_over = trapped = false;
}

bool launch(const std::function<void()> &kernel, Dim3 grid, Dim3 dim, int ctas, size_t shared_bytes, int sms,
            uint64_t seed, const std::atomic<bool> *before)
{
    const auto together = static_cast<unsigned>(ctas);
    std::vector<std::thread> running;
    std::atomic<unsigned> next{0};
    std::atomic<bool> whole{true};
    for (unsigned i = 0; i < std::min(grid.x, static_cast<unsigned>(sms)) / together; i++) {
        const auto own =
            std::make_shared<Runner>(); /* moving from now on, although its thread may start late */
        {
            const std::lock_guard<std::mutex> guard(runners_lock);
            runners.push_back(own);
        }
        running.emplace_back([&, own] {
            run_clusters(kernel, grid, dim, together, shared_bytes, seed, before, next, own, whole);
        });
    }
    for (auto &t : running) t.join();
    return whole;
}

} // namespace emulator
