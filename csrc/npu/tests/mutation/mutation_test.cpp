// SPDX-License-Identifier: Apache-2.0
// Every mutant must be noticed by a detector of the emulator or by wrong values, or be listed as redundant, with the
// reason. Each runs in a process of its own.
//
//   mutation_test REDUNDANT.txt [SHARD SHARDS [FIRST_MUTANT LAST_MUTANT]]
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <set>
#include <sstream>

#include "ascendc_emulator/launch.h"
#include "mutation_switch.h"
#include "npu/tests/kernels/mutation_cases.h"
#include "npu/tests/kernels/run.h"

namespace {

struct Mutant {
  std::string kind, file;
  int line;
  std::string text;
  // As redundant.txt names it; places with the same text are told apart by their order.
  std::string key() const { return file + " " + kind + " " + text; }
};

const std::vector<Mutant>& mutants() {
  static const std::vector<Mutant> all = {
#include "mutants.inc"
  };
  return all;
}

struct Case {
  MutationCase linear;
  Result expected;
};

// Seconds after which a mutant that does not end counts as noticed: the unmutated cases take a tenth of a second.
constexpr unsigned kTimeout = 60;

// What must notice mutants of these kinds, whatever else does; the emulator's own hazards_test.cpp seeds the same
// faults into a small kernel.
const char* required(const Mutant& mutant) {
  if (mutant.kind == "formula") return "values";
  if (mutant.kind == "PipeBarrier") return "hazard";
  if (mutant.kind == "WaitFlag" && mutant.text.find("FIX_MTE1") != std::string::npos) return "hazard";
  return "";
}

bool is_order_alone(const std::string& kind) { return kind == "WaitFlag" || kind == "PipeBarrier"; }

struct Finding {
  std::string words;  // what noticed the mutant; empty if nothing did
  uint64_t instructions = 0;
};

// The cases run in the order of the program, and if nothing is noticed, in random ones.
Result run_case(const MutationCase& test, uint64_t order) {
  ascendc_emulator::Options options;
  options.order = order;
  return run_linear(test.linear, test.cores, test.launch, options);
}
constexpr uint64_t kRandomOrders = 2;

// A missing wait leaves a flag set, whether the order that it enforces matters or not: for such mutants the cases go on
// until something else notices them.
Finding run_mutant(int number, const std::vector<Case>& cases) {
  int channel[2];
  if (pipe(channel) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    close(channel[0]);
    alarm(kTimeout);
    mutation::active = number;
    std::set<std::string> found;
    const uint64_t before = ascendc_emulator::instructions_issued();
    const auto is_noticed = [&] {
      const bool is_flag_alone = found == std::set<std::string>{"flag"};
      return !found.empty() && !(is_flag_alone && is_order_alone(mutants()[number - 1].kind));
    };
    for (uint64_t order = 0; order <= kRandomOrders && found.empty(); ++order) {
      for (const Case& test : cases) {
        const Result result = run_case(test.linear, order);
        std::istringstream lines(result.report);
        for (std::string line; std::getline(lines, line);) found.insert(line.substr(0, line.find(':')));
        if (result.y != test.expected.y || result.activations.q != test.expected.activations.q ||
            result.activations.scale != test.expected.activations.scale) {
          found.insert("values");
        }
        if (is_noticed()) break;
      }
    }
    std::string words = std::to_string(ascendc_emulator::instructions_issued() - before);
    for (const std::string& word : found) words += " " + word;
    if (write(channel[1], words.data(), words.size()) < 0) _exit(1);
    _exit(0);
  }
  close(channel[1]);
  std::string words;
  char buffer[256];
  for (ssize_t count; (count = read(channel[0], buffer, sizeof buffer)) > 0;) words.append(buffer, count);
  close(channel[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) {
    const int signal = WTERMSIG(status);
    return {signal == SIGALRM ? "timeout" : signal == SIGFPE ? "division-by-zero" : "crash", 0};
  }
  const size_t space = words.find(' ');
  return {space == std::string::npos ? "" : words.substr(space + 1), std::strtoull(words.c_str(), nullptr, 10)};
}

// Lines "FILE KIND TEXT | REASON"; '#' starts a comment. A reason that starts with kSavesWork is checked: without what
// is left out the same results take more instructions.
constexpr const char* kSavesWork = "saves work:";

std::map<std::string, std::string> read_redundant(const char* path) {
  std::map<std::string, std::string> all;
  std::ifstream file(path);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path);
    std::exit(2);
  }
  for (std::string line; std::getline(file, line);) {
    const size_t bar = line.find(" | ");
    if (line.empty() || line[0] == '#') continue;
    if (bar == std::string::npos || bar + 3 >= line.size()) {
      std::fprintf(stderr, "%s: expected 'FILE KIND TEXT | REASON', found '%s'\n", path, line.c_str());
      std::exit(2);
    }
    all[line.substr(0, bar)] = line.substr(bar + 3);
  }
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: mutation_test REDUNDANT.txt [SHARD SHARDS [FIRST LAST]]\n");
    return 2;
  }
  const std::map<std::string, std::string> redundant = read_redundant(arguments[1]);
  const int shard = count > 3 ? std::atoi(arguments[2]) : 0, shards = count > 3 ? std::atoi(arguments[3]) : 1;
  const int first = count > 5 ? std::atoi(arguments[4]) : 1;
  const int last = count > 5 ? std::atoi(arguments[5]) : static_cast<int>(mutants().size());

  int failures = 0, noticed = 0, listed = 0;
  std::vector<Case> cases;
  for (const MutationCase& linear : mutation_cases()) {
    const Quantized16 activations = reference_quantize(linear.linear, reference_transform(linear.linear));
    const std::vector<uint16_t> y = reference_multiply(linear.linear, activations);
    for (uint64_t order = 0; order <= kRandomOrders; ++order) {
      const Result result = run_case(linear, order);
      if (order == 0) cases.push_back({linear, result});
      if (!result.report.empty() || result.activations.q != activations.q || result.y != y) {
        ++failures;
        std::printf("FAILED unmutated: %s\n%s", linear.linear.text().c_str(), result.report.c_str());
      }
    }
  }
  const uint64_t instructions = ascendc_emulator::instructions_issued();
  std::map<std::string, int> by;
  std::map<std::string, int> seen;
  for (int number = 1; number <= static_cast<int>(mutants().size()); ++number) {
    const Mutant& mutant = mutants()[number - 1];
    std::string key = mutant.key();
    const int occurrence = ++seen[key];
    if (occurrence > 1) key += " #" + std::to_string(occurrence);
    if (number % shards != shard || number < first || number > last) continue;
    const Finding finding = run_mutant(number, cases);
    const std::string& words = finding.words;
    const auto reason = redundant.find(key);
    std::printf("%3d %-20s %s:%d %s: %s\n", number, words.empty() ? "not noticed" : words.c_str(), mutant.file.c_str(),
                mutant.line, mutant.kind.c_str(), mutant.text.c_str());
    std::fflush(stdout);
    ++by[words.empty() ? "not noticed" : words];
    if (!words.empty()) ++noticed;
    if (!words.empty() && words.find(required(mutant)) == std::string::npos) {
      ++failures;
      std::printf("FAILED: expected to be noticed by '%s'\n", required(mutant));
    }
    if (!words.empty() && words != "crash" && reason == redundant.end()) continue;
    if (words.empty() && reason != redundant.end()) {
      if (reason->second.starts_with(kSavesWork) && finding.instructions <= instructions) {
        ++failures;
        std::printf("FAILED: listed as saving work, but leaving it out takes %llu instructions, not more than %llu\n",
                    static_cast<unsigned long long>(finding.instructions),
                    static_cast<unsigned long long>(instructions));
      }
      ++listed;
      std::printf("    redundant: %s\n", reason->second.c_str());
      continue;
    }
    ++failures;
    if (words == "crash") {
      std::printf("FAILED: the emulator crashed\n");
    } else if (!words.empty()) {
      std::printf("FAILED: listed as redundant, but it is noticed. Remove it from the list: %s\n", key.c_str());
    } else {
      std::printf("FAILED: nothing notices that this is left out: %s\n", key.c_str());
    }
  }
  for (const auto& [words, mutants_by] : by) std::printf("%4d %s\n", mutants_by, words.c_str());
  std::printf("mutation_test: %zu mutants, %d noticed and %d redundant of shard %d/%d, %d failures\n", mutants().size(),
              noticed, listed, shard, shards, failures);
  return failures == 0 && noticed > 0 ? 0 : 1;
}
