"""A program: llama.cpp's own converters over a base and its adapters, in one interpreter with its own libraries.

    python gguf_program.py LLAMA_CPP_SOURCE BASE TARGET_FOLDER ADAPTER...

The converter names a byte-level BPE's way of cutting text by a hash of what it makes of a sample, and refuses a
vocabulary that it has not seen. This benchmark's tokenizer cuts as GPT-2 does, which is what it is told here.
"""

import runpy
import sys
from pathlib import Path


def main(source: Path, base: Path, target: Path, adapters: list[Path]) -> None:
    sys.path[0:0] = [str(source / "gguf-py"), str(source)]
    import conversion.base  # type: ignore[import-not-found]

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    run(source / "convert_hf_to_gguf.py", "--outtype", "bf16", "--outfile", target / "base.gguf", base)
    for adapter in adapters:
        out = target / f"{adapter.name}.gguf"
        run(source / "convert_lora_to_gguf.py", "--base", base, "--outtype", "bf16", "--outfile", out, adapter)


def run(program: Path, *arguments: object) -> None:
    sys.argv = [str(program), *map(str, arguments)]
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), [Path(text) for text in sys.argv[4:]])
