# GLUS with the versions of the lock. On a GPU machine, whose driver doctor checks:
#   docker build -t glus . && docker run --gpus all --shm-size 16g -v $PWD/data:/workspace/data -it glus
# Without one (a tenth of the size):
#   docker build -t glus --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
# Where torch comes from: PyPI's build needs CUDA; an index of pytorch.org has those for other CUDA versions and the CPU.
ARG TORCH_INDEX=https://pypi.org/simple
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev git && rm -rf /var/lib/apt/lists/*
COPY . /opt/glus
RUN PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1 bash /opt/glus/scripts/install.sh
ENV PATH=/opt/glus/.venv/bin:$PATH
WORKDIR /workspace
CMD ["glus", "doctor"]
