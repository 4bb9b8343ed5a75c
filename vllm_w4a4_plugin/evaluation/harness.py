# SPDX-License-Identifier: Apache-2.0
"""The model interface of lm-evaluation-harness, answered by a vLLM engine. Needs the extra `eval`.

The harness has one for vLLM itself, which starts the engine with arguments of older versions, and always one more.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from .served import Served

ANSWER_TOKENS = 256
"""Of a generated answer, where a task names no limit."""

_BATCH = 64
"""Requests that the engine gets at once; progress is shown after each."""


class HarnessModel(TemplateLM):
    """A served model.

    Args:
        model: in its engine.
        listener: is told what is being done, how much of it is done, and of how much.
    """

    def __init__(self, model: Served, listener: Callable[[str, int, int], None]) -> None:
        super().__init__()
        self.model, self.listener = model, listener
        self.tokenizer = model.llm.get_tokenizer()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self.model.directory.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer(string, add_special_tokens=bool(add_special_tokens)).input_ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        from vllm import SamplingParams

        # One place for the token that the engine must generate.
        longest = self.model.max_length - 1
        prompts = [(context + continuation)[-longest:] for _, context, continuation in requests]
        outputs = self._generate(
            "Likelihoods", prompts, [SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)] * len(prompts)
        )
        answers = []
        for (text, _, continuation), prompt, output in zip(requests, prompts, outputs, strict=True):
            # The first token of a prompt is not predicted.
            places = range(len(prompt) - min(len(continuation), len(prompt) - 1), len(prompt))
            entries = [output.prompt_logprobs[place][prompt[place]] for place in places]
            answer = (float(sum(entry.logprob for entry in entries)), all(entry.rank == 1 for entry in entries))
            answers.append(answer)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        answers = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.max_length - 2,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            answers.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        from vllm import SamplingParams

        prompts, parameters = [], []
        for request in requests:
            context, options = request.args[0], dict(request.args[1])
            until = options.get("until") or []
            count = min(int(options.get("max_gen_toks", ANSWER_TOKENS)), self.model.max_length - 1)
            prompts.append(self.tok_encode(context)[-(self.model.max_length - count) :] or [self.prefix_token_id])
            parameters.append(
                SamplingParams(
                    max_tokens=count,
                    stop=[until] if isinstance(until, str) else list(until),
                    temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                    top_p=float(options.get("top_p", 1.0)),
                    seed=0,
                )
            )
        return [output.outputs[0].text for output in self._generate("Answers", prompts, parameters)]

    def _generate(self, what: str, prompts: Sequence[list[int]], parameters: Sequence[Any]) -> list[Any]:
        outputs: list[Any] = []
        for first in range(0, len(prompts), _BATCH):
            self.listener(f"{what}, {self.model.directory.name}", first, len(prompts))
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts[first : first + _BATCH]]
            outputs += self.model.llm.generate(inputs, list(parameters[first : first + _BATCH]), use_tqdm=False)
        return outputs
