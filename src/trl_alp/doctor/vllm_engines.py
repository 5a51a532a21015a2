# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""vLLM as the doctor sees it: in this process, or behind a server."""

import contextlib
import json
import math
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict

import torch

from .engines import Samples, plain_copy


class VLLMEngine:
    """
    vLLM in this process, as in TRL's colocate mode.

    Args:
        llm (`vllm.LLM`):
            The engine. TRL runs its own with `logprobs_mode="processed_logprobs"`.

    `sample` and `score` raise a `RuntimeError` if the engine sleeps.
    """

    def __init__(self, llm):
        self.llm = llm
        config = llm.llm_engine.vllm_config
        self.dtype = config.model_config.dtype
        self.kv_cache_dtype = config.cache_config.cache_dtype
        self.quantization = config.model_config.quantization
        self.logprobs_mode = config.model_config.logprobs_mode
        self.max_logprobs = config.model_config.max_logprobs

    def _check_awake(self):
        # It would take requests and never answer.
        if self.llm.llm_engine.is_sleeping():
            raise RuntimeError(
                "The engine sleeps and has thrown its weights away, so there is nothing to examine. In a run of TRL, "
                "set `vllm_enable_sleep_mode=False` for the diagnosis."
            )

    def sample(self, prompts, setting, seed):
        self._check_awake()
        from vllm import SamplingParams

        parameters = [
            # logprobs=0: of the sampled token alone
            SamplingParams(**asdict(setting), seed=seed * len(prompts) + i, logprobs=0)
            for i in range(len(prompts))
        ]
        if isinstance(prompts[0], str):
            outputs = self.llm.generate(list(prompts), parameters, use_tqdm=False)
        else:
            outputs = self.llm.chat(list(prompts), parameters, use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        return Samples(
            [list(output.prompt_token_ids) for output in outputs],
            [list(completion.token_ids) for completion in completions],
            [[step[t].logprob for t, step in zip(c.token_ids, c.logprobs, strict=True)] for c in completions],
        )

    def score(self, prompt_ids, completion_ids):
        return _of_the_tokens(self.score_top(prompt_ids, completion_ids, 0), completion_ids)

    def score_top(self, prompt_ids, completion_ids, count):
        self._check_awake()
        from vllm import SamplingParams

        if 0 <= self.max_logprobs < count:
            raise NotImplementedError(f"the engine returns at most {self.max_logprobs} log-probs for a token")
        rows = [list(p) + list(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        # vLLM scores prompts at temperature 1 and without processors in every `logprobs_mode`.
        outputs = self.llm.generate(
            [{"prompt_token_ids": row} for row in rows],
            SamplingParams(max_tokens=1, prompt_logprobs=count, detokenize=False),
            use_tqdm=False,
        )
        return [
            [{token: one.logprob for token, one in step.items()} for step in output.prompt_logprobs[len(prompt) :]]
            for output, prompt in zip(outputs, prompt_ids, strict=True)
        ]

    def sync(self, model):
        if self.quantization is not None:
            raise NotImplementedError("a quantised copy takes no new weights")
        with tempfile.TemporaryDirectory() as folder:
            plain_copy(model).save_pretrained(folder)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.llm.reset_prefix_cache()


class VLLMServerEngine:
    """
    A vLLM server, as in TRL's server mode, through TRL's [`~trl.generation.vllm_client.VLLMClient`].

    Args:
        url (`str`):
            Base URL, as in `http://localhost:8000`. The server needs `VLLM_SERVER_DEV_MODE=1`, as for TRL.
        timeout (`float`, *optional*, defaults to `600.0`):
            Longest wait for one answer, in seconds. TRL's client has no limit of its own.

    Raises:
        `ConnectionError`: If no server answers.
        `ImportError`: If vLLM is not installed here, which TRL's client needs.

    All methods raise a `TimeoutError` if the server does not answer in time.
    """

    def __init__(self, url: str, timeout: float = 600.0):
        self.timeout = timeout
        self.client = _client(url, timeout)
        info = self.client.get_server_info()
        dtype = str(info["model_config"]["dtype"]).removeprefix("torch.")
        self.dtype = getattr(torch, dtype, None)
        self.kv_cache_dtype = info["cache_config"]["cache_dtype"]
        self.quantization = info["model_config"]["quantization"]
        self.logprobs_mode = info["model_config"]["logprobs_mode"]
        self._connected = False

    def sample(self, prompts, setting, seed):
        generate = self.client.generate if isinstance(prompts[0], str) else self.client.chat
        # Without the seed: one request has one, so equal prompts would get equal completions.
        out = generate(list(prompts), **asdict(setting))
        logprobs = [
            [
                dict(zip(ids, values, strict=True))[token]
                for token, ids, values in zip(row, row_ids, row_values, strict=True)
            ]
            for row, row_ids, row_values in zip(
                out["completion_ids"], out["logprob_token_ids"], out["logprobs"], strict=True
            )
        ]
        logprobs = [[math.nan if value is None else value for value in row] for row in logprobs]
        return Samples(out["prompt_ids"], out["completion_ids"], logprobs)

    def score(self, prompt_ids, completion_ids):
        return _of_the_tokens(self.score_top(prompt_ids, completion_ids, 0), completion_ids)

    def score_top(self, prompt_ids, completion_ids, count):
        rows = [list(p) + list(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        body = {"model": self.client.model, "prompt": rows, "max_tokens": 1, "prompt_logprobs": count}
        request = urllib.request.Request(
            f"{self.client.base_url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                choices = json.load(answer)["choices"]
        except urllib.error.HTTPError as error:
            raise NotImplementedError(f"the server does not score prompts: {error.read().decode()[:300]}") from error
        except (TimeoutError, urllib.error.URLError) as error:
            if isinstance(getattr(error, "reason", error), TimeoutError):
                raise _no_answer(self.client.base_url, self.timeout) from error
            raise
        return [
            [{int(t): one["logprob"] for t, one in step.items()} for step in choice["prompt_logprobs"][len(prompt) :]]
            for choice, prompt in zip(choices, prompt_ids, strict=True)
        ]

    def sync(self, model):
        if not self._connected:
            self.client.init_communicator(device=model.device)
            self._connected = True
        self.client.update_model_params(plain_copy(model))
        self.client.reset_prefix_cache()


def _of_the_tokens(rows: list[list[dict[int, float]]], completion_ids: Sequence[list[int]]) -> list[list[float]]:
    return [
        [step[token] for step, token in zip(row, ids, strict=True)]
        for row, ids in zip(rows, completion_ids, strict=True)
    ]


def _no_answer(url: str, timeout: float) -> TimeoutError:
    return TimeoutError(f"The vLLM server at {url} has not answered for {timeout:g} seconds.")


def _client(url: str, timeout: float):
    """TRL's client, whose requests have no time limit otherwise, and are repeated after one."""
    import requests
    from requests.adapters import HTTPAdapter
    from trl.generation.vllm_client import VLLMClient

    class Limited(HTTPAdapter):
        def send(self, request, **kwargs):
            try:
                return super().send(request, **(kwargs | {"timeout": timeout}))
            except requests.Timeout as error:
                raise _no_answer(url, timeout) from error

    class Client(VLLMClient):
        def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0):
            for scheme in ("http://", "https://"):
                self.session.mount(scheme, Limited())
            with contextlib.suppress(requests.RequestException):  # TRL says it better
                self.session.get(f"{self.base_url}/health")
            super().check_server(total_timeout, retry_interval)

    return Client(base_url=url)
