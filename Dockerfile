# The base holds the torch that requirements.txt pins, so that pip finds it there and fetches no second one; change both
# together. mpiexec is among what requirements.txt brings.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

# Where the base's Python is Debian's, it comes without venv.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home sdm \
    && install --directory --owner=sdm --group=sdm /workspace/sdm

USER sdm
WORKDIR /workspace/sdm
# The environment lies where scripts/setup.sh looks for it.
ENV PATH=/workspace/sdm/.venv/bin:$PATH PYTHONUNBUFFERED=1

COPY --chown=sdm:sdm requirements.txt ./
RUN python -m venv --system-site-packages .venv \
    && .venv/bin/python -m pip install --no-cache-dir --requirement requirements.txt

COPY --chown=sdm:sdm pyproject.toml image_train.py image_sample.py ./
COPY --chown=sdm:sdm guided_diffusion guided_diffusion/
COPY --chown=sdm:sdm scripts scripts/
COPY --chown=sdm:sdm tests tests/

CMD ["bash"]
