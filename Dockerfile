# An image for machines with NVIDIA GPUs: lrsa with all that training needs. flash-attn is optional: without it dense
# attention runs on PyTorch's own flash kernels.
#   docker build -t lrsa .                                   # add --build-arg FLASH_ATTN=1 to compile flash-attn
#   docker run --gpus all -v $PWD/runs:/lrsa/runs lrsa deepspeed launch/train.py --config qa.yaml
ARG BASE=pytorch/pytorch:2.9.0-cuda12.8-cudnn9-devel
FROM ${BASE}
ARG FLASH_ATTN=0
ARG EXTRAS=train,serve
WORKDIR /lrsa
ENV PIP_NO_CACHE_DIR=1 HF_HOME=/lrsa/runs/.huggingface
COPY pyproject.toml README.md LICENSE ./
COPY lrsa lrsa
# The torch of the base image stays: pip finds its requirement met.
RUN pip install --editable ".[${EXTRAS}]" && if [ "${FLASH_ATTN}" = 1 ]; then pip install --no-build-isolation flash-attn; fi
COPY data data
COPY train train
COPY launch launch
COPY configs configs
CMD ["python", "launch/train.py", "--help"]
