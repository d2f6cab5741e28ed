# Moviola on GPUs: `docker build -t moviola .`; the image serves as Ray head, Ray worker and RayJob submitter alike.
#
# torch 2.13 from PyPI is built against CUDA 13.0.2 (compatibility matrix in PyTorch's RELEASE.md) and its wheels bring
# the CUDA libraries; DeepSpeed builds no operators here. So the `base` flavour is enough; the host's driver must serve
# CUDA 13.0: 580 or newer. Ubuntu 24.04 has Python 3.12.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# ffmpeg: torchcodec's libraries. gcc and python3-dev: torch.compile's launchers. wget: KubeRay's health probes.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ffmpeg gcc libc6-dev python3-dev python3-venv wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 moviola \
 && install -d -o moviola -g moviola /opt/venv /app

USER moviola
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

COPY --chown=moviola pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=moviola pipelines pipelines
COPY --chown=moviola trainer trainer
COPY --chown=moviola cluster cluster
RUN python3 -m venv /opt/venv && pip install --no-cache-dir -c constraints.txt '.[models]'
COPY --chown=moviola manifests manifests

CMD ["moviola", "--help"]
