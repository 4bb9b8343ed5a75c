# SPDX-License-Identifier: Apache-2.0
"""Vision-language models whose text part is quantized: text and image prompts, compared with a transformers model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel
from vllm import LLM, SamplingParams

from tests.engine.engines import engine
from tests.engine.oracle import ReferenceLinear
from tests.vision import MODELS, new_model, published_name, quant_type, write_model
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType

TEXT = " ".join(f"w{number * 37 % 199}" for number in range(24))
IMAGE = f"w3 w14 <|vision_start|><|image_pad|><|vision_end|> {TEXT}"
NEW_TOKENS = 8


@pytest.fixture(scope="module", params=[(name, described) for name in MODELS for described in (True, False)], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, LLM]]:
    """Kind of model, its directory and an engine that serves it; with and without the tower in the description."""
    name, described = request.param
    directory = tmp_path_factory.mktemp(name)
    write_model(name, directory, described)
    options = {"quantization": "ascend", "gpu_memory_utilization": 0.1, "max_model_len": 256}
    with engine(directory, in_this_process=True, **options) as llm:
        yield name, directory, llm


def picture(seed: int) -> Image.Image:
    """Coarse random colours, 70 x 90 pixels, which the processor resizes."""
    pixels = torch.randint(256, (6, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((90, 70))


def served(llm: LLM, text: str, *images: Image.Image) -> tuple[list[int], torch.Tensor]:
    """Ids of the prompt and of what vLLM makes of it, and the log probability of each but the first."""
    prompt = {"prompt": text, **({"multi_modal_data": {"image": list(images)}} if images else {})}
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    output = llm.generate([prompt], params, use_tqdm=False)[0]
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return ids, torch.tensor([entry[token].logprob for entry, token in zip(entries, ids[1:], strict=True)])


def reference_model(name: str, directory: Path) -> PreTrainedModel:
    """The model of transformers with the checkpoint's tensors, its quantized linears computed by the reference."""
    reader, model = CheckpointReader(directory), new_model(name)
    for module in [module for module, _ in model.named_modules()]:
        stored = published_name(name, module)
        if "visual" not in stored and (kind := quant_type(stored)) is not QuantType.FLOAT:
            model.set_submodule(module, ReferenceLinear(reader, stored, kind))
    model.load_state_dict({key: reader.load(published_name(name, key)) for key in model.state_dict()})
    return model


def expected(name: str, directory: Path, ids: list[int], text: str, *images: Image.Image) -> torch.Tensor:
    """Log probability of each id but the first, given those before it; `ids` begin with those of `text`."""
    return log_probabilities(reference_model(name, directory), directory, ids, text, *images)


def log_probabilities(
    model: torch.nn.Module, directory: Path, ids: list[int], text: str, *images: Image.Image
) -> torch.Tensor:
    """The same of any model of transformers."""
    inputs = AutoProcessor.from_pretrained(directory)(text=[text], images=list(images) or None, return_tensors="pt")
    prompt = inputs.pop("input_ids")[0].tolist()
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(prompt) + NEW_TOKENS
    inputs.pop("attention_mask")
    kinds = inputs.pop("mm_token_type_ids", torch.zeros(1, len(prompt), dtype=torch.int))
    kinds = torch.nn.functional.pad(kinds, (0, NEW_TOKENS))
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), mm_token_type_ids=kinds, **inputs).logits[0]
    return logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


@pytest.mark.feature("vision-language models")
@pytest.mark.engine
def test_text_has_the_log_probabilities_of_the_torch_model(model: tuple[str, Path, LLM]) -> None:
    name, directory, llm = model
    ids, found = served(llm, TEXT)
    difference = found - expected(name, directory, ids, TEXT)
    assert difference.abs().max() < 1e-3


@pytest.mark.engine
def test_an_image_has_the_log_probabilities_of_the_torch_model(model: tuple[str, Path, LLM]) -> None:
    name, directory, llm = model
    ids, found = served(llm, IMAGE, picture(1))
    difference = found - expected(name, directory, ids, IMAGE, picture(1))
    assert difference.abs().max() < 1e-3
    other = found - expected(name, directory, ids, IMAGE, picture(2))
    assert other.abs().max() > 0.1  # the picture matters
