# The training agent as a container. It dials out; nothing needs to reach it.
#
#   docker build -t training-agent .
#   docker run -d --gpus all --shm-size 8g --stop-timeout 150 --restart unless-stopped \
#     -e BACKEND_URL=https://app.finetunelab.ai -e API_KEY=wak_... \
#     -v training-agent:/data -v huggingface:/cache training-agent
#
# --shm-size     data loader workers hand batches over in shared memory; Docker's 64 MB is too little.
# --stop-timeout must be longer than STOP_GRACE_SECONDS (120): Docker kills after 10 s unless told,
#                and a trainer killed in its save falls back to the checkpoint before.
# PUID, PGID     owner of the files in the volumes; the agent runs as this user, never as root.
#
# agent/setup/compose.yaml says the same for Docker Compose.

# PyTorch's wheels bring CUDA along, so a slim Python is enough for a GPU too. A CUDA base serves
# what compiles kernels: --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# For a machine without a GPU, 3 GB smaller: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=

# gcc: Triton compiles its launcher on the machine. A CUDA base has no Python of its own.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && if ! command -v python3 >/dev/null; then \
         apt-get install -y --no-install-recommends python3 python3-dev python3-venv; fi \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/training-agent
# The dependencies first, so that a change of our code does not fetch PyTorch again.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && if [ -n "$TORCH_INDEX" ]; then \
         grep '^torch' requirements.txt > torch.txt \
         && pip install --no-cache-dir --index-url "$TORCH_INDEX" -r torch.txt; fi \
    && pip install --no-cache-dir -r requirements.txt
COPY README.md LICENSE ./
COPY protocol protocol
COPY agent agent
RUN pip install --no-cache-dir --no-deps .

# HOST: only ports that are published can be reached, and every call but /health needs the token.
# BAD_KEY_SLEEP: with a restart policy, a wrong key would otherwise dial, be refused and restart for ever.
# USER: libraries ask who they are, and PUID has no entry in /etc/passwd.
ENV PUID=1000 PGID=1000 \
    HOME=/data/home USER=agent \
    AGENT_HOME=/data/agent \
    MODELS_DIR=/data/models DATASETS_DIR=/data/datasets \
    CHECKPOINTS_DIR=/data/checkpoints LOGS_DIR=/data/logs \
    HF_HOME=/cache/huggingface \
    HOST=0.0.0.0 PORT=8000 \
    BAD_KEY_SLEEP=3600 \
    PYTHONUNBUFFERED=1

VOLUME ["/data", "/cache"]
EXPOSE 8000
WORKDIR /data
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + (os.environ.get('PORT') or '8000') + '/health', timeout=4)"]

# Process 1 waits for the trainers' saves after the agent has left; the kernel kills what outlives it.
ENTRYPOINT ["python", "-m", "agent.setup.init"]
CMD ["python", "-m", "agent", "start"]
