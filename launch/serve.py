"""Serve an adapter, a merged model or a finished run over compressed caches, as OpenAI's API.

  python launch/serve.py --run runs/qa
  python launch/serve.py --model user/qa-lora --port 8001

  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'

For trying an adapter at once, with any client of that API (base_url http://localhost:8000/v1, any key). Requests are
answered together, as a stream with "stream": true; a conversation that goes on keeps its compressed cache and reads its
new turn alone. `usage` says how many bytes the cache holds and how many a full one would, /metrics says it for all
requests. Not for production: docs/serving.md says what vLLM or SGLang would need.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    # As a script, launch/ comes first on the path; the package lrsa lies one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command_line import Parser, explain

    parser = Parser("serve.py", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="directory of a finished run")
    source.add_argument("--model", metavar="DIR_OR_HUB_ID", help="adapter, or model into which one was merged")
    parser.add_argument("--base-model", metavar="DIR_OR_HUB_ID", help="the adapter's base, when it has moved")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights, such as bfloat16; by default as they are stored"
    )
    parser.add_argument("--device", help="such as cuda:0; by default the GPU where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000, help="8000 by default")
    parser.add_argument("--max-batch", type=int, default=8, help="requests answered at the same time, 8 by default")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer when a request does not say, 256")
    options = parser.parse_args()
    return explain(lambda: serve(options))


def serve(options: argparse.Namespace) -> None:
    import torch

    import lrsa
    from train.settings.errors import Problem, SettingsError

    try:
        import uvicorn

        from lrsa.serving.api import Server
        from lrsa.serving.engine import Engine
    except ImportError as error:
        text = f"{error.name} is not installed: pip install 'lrsa[serve]'"
        raise SettingsError([Problem("", "serving", text)]) from error

    name = options.run or options.model
    try:
        loaded = lrsa.load(name, base_model=options.base_model, dtype=options.dtype)
        prompt = lrsa.PromptFormat.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise SettingsError([Problem("--run" if options.run else "--model", name, f"{error}")]) from error
    loaded.model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    engine = Engine(*loaded, max_batch=options.max_batch)
    server = Server(engine, Path(name).name if options.run else name, prompt, options.max_tokens)
    print(f"serving {server.name} at http://{options.host}:{options.port}/v1 (stop with Ctrl-C)", flush=True)
    try:
        uvicorn.run(server.app, host=options.host, port=options.port, log_level="warning")
    finally:
        engine.close()


if __name__ == "__main__":
    sys.exit(main())
