#!/bin/bash
# Install what tests open beside Python: a headless browser for report.html, zsh and fish for the completion
# (Debian, root).
set -euo pipefail
command -v chromium >/dev/null && command -v zsh >/dev/null && command -v fish >/dev/null && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 update -qq
apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 install -y -qq --no-install-recommends \
    chromium fonts-dejavu-core zsh fish >/dev/null
