#!/bin/sh
# What no wheel brings: Python's venv module, which Debian packages apart, and EGL with Mesa, through which VTK draws
# without a screen. Installs what is missing where it may (Debian, root); elsewhere it says what to install.
set -eu
python=$1
PATH=$PATH:/usr/sbin:/sbin

[ "$(uname -s)" = Linux ] || exit 0

packages=
"$python" -c 'import ensurepip' 2>/dev/null || packages="python3-venv"
if ! { ldconfig -p | grep -q 'libEGL\.so\.1' && ldconfig -p | grep -q -E 'libEGL_(mesa|nvidia)\.so'; }; then
    packages="$packages libegl1 libegl-mesa0 libgl1-mesa-dri"
fi
[ -n "$packages" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq --yes --no-install-recommends $packages </dev/null >/dev/null
else
    echo "latentphys: some system libraries are missing; as root: apt-get install $packages" >&2
fi
