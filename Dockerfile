# The environments of scripts/environments.sh, one per target (docs/docker.md):
#   docker build -t llm2clip .                             training, with LLaVA beside it
#   docker build -t llm2clip-llava --target llava .        LLaVA 1.5 with this package
#   docker build -t llm2clip-test --target test . && docker run --rm --ipc=host llm2clip-test      every check
FROM python:3.11-slim-bookworm AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# DeepSpeed compiles small C++ extensions at first use
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/llm2clip
COPY . .
# any user (docker run --user) may write what is compiled or cached at run time
ENV TORCH_EXTENSIONS_DIR=/tmp/torch-extensions PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1

FROM base AS llava
RUN ROOT=$PWD; . scripts/environments.sh; llava_environment .venv-llava
ENV PATH=/opt/llm2clip/.venv-llava/bin:$PATH
WORKDIR /work

FROM base AS test
RUN ROOT=$PWD; . scripts/environments.sh; train_environment .venv train,dev; llava_environment .venv-llava
ENV TORCH_EXTENSIONS_DIR=
CMD ["scripts/test.sh"]

FROM base AS train
RUN ROOT=$PWD; . scripts/environments.sh; train_environment .venv train
ENV PATH=/opt/llm2clip/.venv/bin:$PATH
WORKDIR /work
