import os


# Before anything imports transformers: nothing is downloaded, nothing is reported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging

import pytest


@pytest.fixture(autouse=True)
def _hear_infos(caplog):
    caplog.set_level(logging.INFO, logger="trl_alp")
