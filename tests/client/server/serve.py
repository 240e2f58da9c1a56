"""A real server of the Tinker API without a GPU: TuFT, with a tiny model of random weights.

Run it with ``python serve.py FOLDER PORT``; it serves on 127.0.0.1 until SIGTERM. What it writes, the model
and all checkpoints, goes to FOLDER, whose name has to be short (Ray puts sockets there).
"""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

MODEL = "tiny"
KEY = "tml-test"  # the SDK refuses keys that do not begin with tml-
VOCABULARY = 256
MAX_RANK = 16

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # the model is too small for more, and the tests want the other cores
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
# On the CPU on machines that have a GPU as well; Ray would show the GPU to its worker again.
OF_WORKERS = {"CUDA_VISIBLE_DEVICES": "", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def without_cuda():
    """Let PyTorch's one call that TuFT makes and that fails without CUDA do nothing."""
    import torch

    def nothing(*args, **kwargs):
        pass

    torch.cuda.reset_peak_memory_stats = nothing


def write_model(folder):
    """Two layers of a Qwen3 in float32, always the same weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,  # the usual 0.02 predicts every token with nearly the same probability
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)


def write_tokenizer(folder):
    """One token for each byte."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def start_ray(folder):
    """Ray with a GPU that is not there, as TuFT's trainer asks for one."""
    import ray

    ray.init(
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _temp_dir=str(folder / "ray"),
        runtime_env={"worker_process_setup_hook": without_cuda, "env_vars": OF_WORKERS},
    )


def make_app(folder):
    """TuFT's application, with its trainer loaded: otherwise the first request waits for that."""
    from tuft.config import AppConfig, ModelConfig
    from tuft.server import create_root_app

    model = ModelConfig(
        model_name=MODEL,
        model_path=folder / "model",
        max_model_len=512,
        capabilities=["training"],  # sampling takes vLLM
        max_lora_rank=MAX_RANK,
    )
    app = create_root_app(
        AppConfig(
            checkpoint_dir=folder / "checkpoints", supported_models=[model], authorized_users={KEY: "tester"}
        )
    )
    asyncio.run(app.state.server_state.training.training_backends[MODEL].async_init())
    return app


def stop_with_parent():
    """Stop when the process that started this one is gone, however it went."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def exit_on_sigterm():
    """Leave by an exception, so that Ray is stopped too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def descendants(pid):
    """The processes below this one, now: those that lose their parent are not found any more."""
    import psutil

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end(processes, seconds):
    """Wait until they are gone; kill those that take longer."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=seconds)


def stop_ray():
    """Stop Ray and wait for its processes, which it does not do itself."""
    import ray

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    processes = descendants(os.getpid())
    ray.shutdown()
    end(processes, seconds=5)


def serve(folder, port):
    """Serve until SIGTERM, then stop Ray."""
    import uvicorn

    try:
        start_ray(folder)
        exit_on_sigterm()  # again, as Ray has put its own handler there
        uvicorn.run(make_app(folder), host="127.0.0.1", port=port, timeout_graceful_shutdown=5)
    finally:
        stop_ray()


def main():
    folder, port = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    os.environ.update(ENVIRONMENT)
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # otherwise Ray writes one to the home folder
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray starts without GPUs where this hides them
    exit_on_sigterm()
    stop_with_parent()
    without_cuda()
    write_model(folder / "model")
    write_tokenizer(folder / "model")
    serve(folder, port)


if __name__ == "__main__":
    main()
