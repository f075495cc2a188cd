# rvc_dist for CUDA. Build and try it, with my.yaml and the recordings in this folder:
#   docker build -t rvc_dist .
#   docker run --init --gpus all --shm-size 8g -v "$PWD:/data" --user "$(id -u)" rvc_dist run --config my.yaml
# --shm-size: of the usual 64 MB the first big batch of clips takes all of /dev/shm (Kubernetes: launch/kubernetes).
# The wheels of PyTorch bring CUDA and cuDNN along: only the driver is the machine's.
FROM python:3.12.8-slim-bookworm

RUN useradd --uid 1000 --create-home rvc && install --directory --owner=rvc --group=rvc /data

# A layer of its own: it is the largest by far, and the same for every change of the code.
RUN pip install --no-cache-dir --no-compile "torch>=2.6"
COPY . /opt/rvc_dist
RUN pip install --no-cache-dir --no-compile "/opt/rvc_dist[gpu,f0,formats,loudness,denoise]"

USER 1000
# Encoders and base models that are fetched stay with the runs.
ENV HF_HOME=/data/huggingface PYTHONUNBUFFERED=1
WORKDIR /data
ENTRYPOINT ["rvc-dist"]
CMD ["--help"]
