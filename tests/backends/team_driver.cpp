// Teams of one leader and up to seven others run thousands of short loops, every index of which
// must run once; and pieces must cover the blocks of a product once each, in order. Prints what
// went wrong; exit status 1 if anything did. For the thread sanitizer the loops write memory that
// is not atomic, as a product's does.
#include <cstdio>
#include <thread>
#include <vector>

#include "pieces.h"
#include "team.h"

namespace {

using bitdistill::Pieces;
using bitdistill::Team;

int failures = 0;

void fail(const char *what, long long a, long long b) {
  std::printf("%s: %lld, %lld\n", what, a, b);
  ++failures;
}

// One loop: how often each index was run, and what the loop before it left.
struct Loop {
  std::vector<int> runs;
  const std::vector<int> *before;
  bool seen = true;

  static void body(void *data, size_t index) {
    Loop &loop = *static_cast<Loop *>(data);
    ++loop.runs[index];
    // All of the loop before is over, whoever ran it.
    if (loop.before->back() != 1 || loop.before->front() != 1) loop.seen = false;
  }
};

// The work of a leader: loops of 1 to 17 indices, in memory of its own that is gone afterwards.
void lead(Team *team, int loops) {
  std::vector<int> before = {1};
  for (int i = 0; i < loops; ++i) {
    Loop loop = {std::vector<int>(static_cast<size_t>(1 + i % 17)), &before};
    team->run(Loop::body, &loop, loop.runs.size());
    for (const int count : loop.runs)
      if (count != 1) fail("an index of a loop was not run once", i, count);
    if (!loop.seen) fail("a loop began before the last was over", i, 0);
    before = loop.runs;
  }
  team->finish();
}

// As an operator's call has them: whoever comes first leads, with `helpers` beside it.
void call(int helpers, int loops) {
  Team team;
  int leaders[8] = {};
  const auto join = [&](int *leader) {
    if (!team.leads()) return team.help();
    *leader = 1;
    lead(&team, loops);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i <= helpers; ++i) threads.emplace_back(join, &leaders[i]);
  join(&leaders[0]);
  for (std::thread &thread : threads) thread.join();
  int led = 0;
  for (const int leader : leaders) led += leader;
  if (led != 1) fail("a team must have one leader", led, helpers);
}

// Helpers that come one after another, some when all is over.
void call_with_late_helpers(int loops) {
  Team team;
  if (!team.leads() || team.leads()) fail("the first leads, and no other", 0, 0);
  std::vector<std::thread> threads;
  std::thread leader([&] { lead(&team, loops); });
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&] { team.help(); });
    std::this_thread::yield();
  }
  leader.join();
  for (int i = 0; i < 2; ++i) team.help();
  for (std::thread &thread : threads) thread.join();
}

void finish_before_anyone_helps() {
  Team team;
  if (!team.leads()) fail("the first leads", 0, 0);
  team.finish();
  std::thread([&] { team.help(); }).join();
  team.help();
}

void check_pieces() {
  for (int64_t blocks = 1; blocks <= 300; ++blocks)
    for (int64_t threads = 1; threads <= 64; ++threads) {
      const Pieces pieces(blocks, threads);
      if (pieces.count() < 1 || pieces.first(0) != 0 || pieces.first(pieces.count()) != blocks)
        fail("pieces do not begin and end with the blocks", blocks, threads);
      for (int64_t piece = 0; piece < pieces.count(); ++piece)
        if (pieces.first(piece) >= pieces.first(piece + 1)) fail("an empty piece", blocks, threads);
    }
}

}  // namespace

int main() {
  for (const int helpers : {0, 1, 2, 3, 7}) {
    for (int i = 0; i < 50; ++i) call(helpers, 3);
    call(helpers, 3000);
  }
  for (int i = 0; i < 20; ++i) call_with_late_helpers(i % 2 == 0 ? 1 : 500);
  finish_before_anyone_helps();
  check_pieces();
  std::puts(failures == 0 ? "good" : "WRONG");
  return failures == 0 ? 0 : 1;
}
