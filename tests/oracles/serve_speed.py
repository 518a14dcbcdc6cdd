"""Compares the speed of `chat serve` with that of llama.cpp's server, over the interface that both have.

Starts one server after the other, on the same model and as many threads, and asks both the same questions: N clients at a
time, each asking its next question when the answer to the last one is there. Temperature 0, so that both give the same
answers as far as their roundings do. Prints a JSON line for each server and number of clients: tokens a second over all
clients from the first request to the last answer, and the seconds to the first token of an answer.

llama.cpp's server is the C++ program of the sources in the package `llama-cpp-python` 0.3.36, with its continuous
batching; the server of that package's own answers one request after the other.

    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \\
        -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-server
    python llama_cpp_python-0.3.36/vendor/llama.cpp/convert_hf_to_gguf.py CHECKPOINT --outtype f32 --outfile model.gguf
    python tests/oracles/serve_speed.py --checkpoint CHECKPOINT --gguf model.gguf --llama-server build/bin/llama-server

Needs Python 3.10 and nothing else.
"""

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

# Every question is another text, so that no server gains by remembering the last one's prompt.
ANIMALS = ["fox", "owl", "hare", "bear", "crow", "seal", "mole", "duck"]
THINGS = ["red boat", "lost key", "tall tower", "broken clock", "silver whistle", "paper map", "stone bridge", "old lamp"]
REQUEST = (
    "{i}. Write a long story for children about a {animal} and a {thing}. Say where they live, whom they meet on the way, "
    "what goes wrong, and how it ends well. Use simple words and short sentences, and give every animal in it a name."
)


def question(i):
    return REQUEST.format(i=i + 1, animal=ANIMALS[i % 8], thing=THINGS[i // 8 % 8])


async def ask(port, content, max_tokens):
    """Streams one answer; seconds to its first token, and its number of tokens."""
    body = json.dumps({
        "model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    status = await reader.readline()
    assert b" 200 " in status, status + await reader.read()
    first, tokens = None, None
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        assert "error" not in event, event
        if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
            first = time.perf_counter() - began
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    writer.close()
    assert first is not None and tokens, "the stream ended early"
    return first, tokens


async def crowd(port, clients, each, max_tokens):
    """`clients` at a time, `each` questions one after the other: tokens, seconds, seconds to each first token."""
    firsts, tokens = [], 0

    async def client(number):
        nonlocal tokens
        for turn in range(each):
            first, n = await ask(port, question(turn * clients + number), max_tokens)
            firsts.append(first)
            tokens += n

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return tokens, time.perf_counter() - began, firsts


def quantile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A server while it runs."""

    def __init__(self, command, port):
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert self.process.poll() is None, f"`{command[0]}` ended with {self.process.returncode}"
                time.sleep(0.2)
        raise TimeoutError(f"`{command[0]}` does not answer")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def commands(args, port):
    slots, threads = max(args.clients), str(args.threads)
    # A slot of llama.cpp's server has its share of the context.
    context = 512 + args.max_tokens
    kindling = [args.chat, "serve", "--checkpoint", f"m={args.checkpoint}", "--port", str(port), "--threads", threads,
                "--slots", str(slots), "--max-context", str(context), "--trunk", args.trunk]
    llama = [args.llama_server, "--model", args.gguf, "--port", str(port), "--threads", threads, "--threads-batch", threads,
             "--parallel", str(slots), "--ctx-size", str(context * slots), "--cache-ram", "0"]
    return {"kindling": kindling, "llama.cpp": llama}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="the model for `chat serve`")
    parser.add_argument("--gguf", required=True, help="the same model for llama.cpp")
    parser.add_argument("--chat", default="target/release/chat")
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--trunk", default="f32", help="precision of the weights in `chat serve`")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--each", type=int, default=2, help="questions of a client; four of a client that is alone")
    parser.add_argument("--rounds", type=int, default=3, help="how often each server is measured, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["kindling", "llama.cpp"])
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end the servers
    measured = {}
    for _ in range(args.rounds):
        for name in ["kindling", "llama.cpp"]:
            if args.only not in (None, name):
                continue
            port = free_port()
            with Server(commands(args, port)[name], port):
                asyncio.run(crowd(port, 1, 1, 16))  # what is done once
                for clients in args.clients:
                    each = 4 if clients == 1 else args.each
                    of_round = asyncio.run(crowd(port, clients, each, args.max_tokens))
                    measured.setdefault((name, clients), []).append(of_round)
                    tokens, seconds, firsts = of_round
                    print(f"{name}, {clients} clients: {tokens} tokens in {seconds:.1f} s, first after "
                          f"{quantile(firsts, 0.5):.2f} s", file=sys.stderr, flush=True)
    for (name, clients), rounds in measured.items():
        firsts = [first for _, _, of_round in rounds for first in of_round]
        print(json.dumps({
            "server": name, "clients": clients, "threads": args.threads, "trunk": args.trunk, "gguf": args.gguf,
            "rounds": len(rounds), "requests": len(firsts), "tokens": sum(tokens for tokens, _, _ in rounds),
            "tokens_per_second": round(statistics.median(tokens / seconds for tokens, seconds, _ in rounds), 1),
            "of_rounds": [round(tokens / seconds, 1) for tokens, seconds, _ in rounds],
            "first_token_p50": round(quantile(firsts, 0.5), 3), "first_token_p99": round(quantile(firsts, 0.99), 3),
        }))


if __name__ == "__main__":
    main()
