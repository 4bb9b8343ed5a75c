// SPDX-License-Identifier: Apache-2.0
#include "fibers.h"

#include <ucontext.h>

#include <utility>
#include <vector>

namespace ascendc_emulator {
namespace {

constexpr size_t kStackBytes = 512 * 1024;
Fibers* entering = nullptr;  // makecontext passes no pointers

}  // namespace

struct Fibers::Contexts {
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
};

Fibers::Fibers(uint32_t count, std::function<void(uint32_t)> body)
    : body_(std::move(body)), contexts_(std::make_unique<Contexts>()) {
  contexts_->fibers.resize(count);
  for (ucontext_t& context : contexts_->fibers) {
    contexts_->stacks.push_back(std::make_unique_for_overwrite<char[]>(kStackBytes));
    getcontext(&context);
    context.uc_stack.ss_sp = contexts_->stacks.back().get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, Enter, 0);
  }
}

Fibers::~Fibers() = default;

void Fibers::Enter() {
  Fibers& self = *entering;
  const uint32_t index = self.running_;
  self.body_(index);
  swapcontext(&self.contexts_->fibers[index], &self.contexts_->scheduler);
}

void Fibers::Resume(uint32_t index) {
  entering = this;
  running_ = index;
  swapcontext(&contexts_->scheduler, &contexts_->fibers[index]);
}

void Fibers::Yield() { swapcontext(&contexts_->fibers[running_], &contexts_->scheduler); }

}  // namespace ascendc_emulator
