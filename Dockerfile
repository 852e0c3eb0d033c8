# The base holds the torch that requirements.txt pins, so that pip finds it there and fetches no second one; change both
# together. mpiexec is among what requirements.txt brings.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

# Where the base's Python is Debian's, it comes without venv and headers; a runtime image has no C++ compiler. --compile
# True needs both, on a CPU and, for Triton, on a GPU. tini hands on the signal of `docker stop`, which the first process
# of a container would not get from the kernel by default, and training saves at.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home sdm \
    && install --directory --owner=sdm --group=sdm /workspace/sdm

USER sdm
WORKDIR /workspace/sdm
# The environment lies where scripts/setup.sh looks for it. Caches lie where any user may write.
ENV PATH=/workspace/sdm/.venv/bin:$PATH PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/cache/matplotlib NUMBA_CACHE_DIR=/tmp/cache/numba \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/torchinductor

COPY --chown=sdm:sdm requirements.txt requirements-workflow.txt ./
COPY --chown=sdm:sdm scripts/setup.sh scripts/
# Any --user may write where the commands write by default.
RUN python -m venv --system-site-packages .venv \
    && PIP_NO_CACHE_DIR=1 bash scripts/setup.sh workflow \
    && install --directory --mode=1777 OUTPUT RESULTS demo_output /tmp/cache

COPY --chown=sdm:sdm . .

ENTRYPOINT ["tini", "--"]
CMD ["bash"]
