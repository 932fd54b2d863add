# What llama.cpp does with a file, by its Python package: a prompt of random tokens, then decoding.
# Arguments: file, threads, prompt, decoded tokens, 1 to repack weights. Prints one JSON document.
import json
import os
import random
import sys
import time

# Only the result and what went wrong are said; llama.cpp says a lot.
out, err = os.dup(1), os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.dup2(1, 2)
sys.excepthook = lambda kind, value, _: os.write(err, f"{kind.__name__}: {value}\n".encode())
import llama_cpp as L

path, threads, prompt, decode, repack = sys.argv[1], *map(int, sys.argv[2:6])
L.llama_backend_init()
start = time.time()
mp = L.llama_model_default_params()
mp.n_gpu_layers = 0
if not repack:
    mp.use_extra_bufts = False
model = L.llama_model_load_from_file(path.encode(), mp)
assert model, "llama.cpp cannot load " + path
cp = L.llama_context_default_params()
cp.n_ctx, cp.n_batch, cp.n_ubatch = prompt + decode + 64, max(prompt, 64), 512
cp.n_threads = cp.n_threads_batch = threads
context = L.llama_init_from_model(model, cp)
assert context, "llama.cpp has no memory for the context"
memory = L.llama_get_memory(context)
vocabulary = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
loaded = time.time() - start
rng = random.Random(1)


def run(n):
    tokens = (L.llama_token * n)(*[rng.randrange(vocabulary) for _ in range(n)])
    assert L.llama_decode(context, L.llama_batch_get_one(tokens, n)) == 0, f"llama.cpp cannot compute {n} tokens"
    L.llama_synchronize(context)


def once(prompt, decode):
    L.llama_memory_clear(memory, True)
    start = time.time()
    run(prompt)
    middle = time.time()
    for _ in range(decode):
        run(1)
    return prompt / (middle - start), decode / (time.time() - middle), middle - start


once(min(prompt, 64), 2)
prefill, decode, first = once(prompt, decode)
os.write(out, json.dumps({"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "time_to_first_token_s": first,
                          "load_s": loaded, "version": L.__version__}).encode())
