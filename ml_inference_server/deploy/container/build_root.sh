#!/bin/sh
# Builds the root of the image: Debian's Python, the libraries that wheels need, the packages of requirements.lock, this
# package, and nothing else: no shell, no package manager, no user but 10001. The Containerfile and the tests run it, in the
# checkout, on a Debian with apt-get:
#   build_root.sh system   ROOT amd64|arm64               Debian's part, into an empty folder
#   build_root.sh packages ROOT amd64|arm64 "EXTRA..."    what the lock says for the core and these extras of pyproject.toml
#   build_root.sh program  ROOT amd64|arm64               this package
# Nothing of the root is run but for bytecode, so any machine builds both. $BUILDER is a Python environment with what
# builder.lock lists. $APT_SOURCES names a file of sources to use instead of the machine's own.
set -eu

fail() {
  echo "build_root.sh: $*" >&2
  exit 2
}

[ $# -ge 3 ] || fail "usage: build_root.sh system|packages|program ROOT amd64|arm64 [EXTRAS]"
step=$1
mkdir -p -- "$2"
root=$(cd -- "$2" && pwd)
architecture=$3
case $architecture in
  amd64) platform=x86_64-manylinux_2_40 machine=x86_64-linux-gnu loader=lib64/ld-linux-x86-64.so.2 ;;
  arm64) platform=aarch64-manylinux_2_40 machine=aarch64-linux-gnu loader=lib/ld-linux-aarch64.so.1 ;;
  *) fail "$architecture is neither amd64 nor arm64" ;;
esac
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT

apt() { # as for an empty system of that architecture
  apt-get -q=2 -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" -o APT::Sandbox::User=root \
    -o Dir::State="$scratch/state" -o Dir::State::status=/dev/null -o Dir::Cache="$scratch/cache" -o Debug::NoLocking=true \
    -o APT::Install-Recommends=false -o APT::Keep-Downloaded-Packages=true -o Acquire::Languages=none \
    ${APT_SOURCES:+-o Dir::Etc::sourcelist="$APT_SOURCES" -o Dir::Etc::sourceparts=/dev/null} "$@"
}

unpack() { # package file
  dpkg-deb --fsys-tarfile "$1" | tar -x -C "$root" --keep-directory-symlink --no-same-owner --exclude='./usr/share/man/*' \
    --exclude='./usr/share/locale/*' --exclude='./usr/share/info/*' --exclude='./usr/share/lintian/*' \
    --exclude='./usr/share/bug/*' --exclude='./usr/lib/*/gconv/*' --exclude='./usr/sbin/*' --exclude='./sbin/*'
}

system() {
  [ -z "$(ls -A -- "$root")" ] || fail "$root is not empty"
  mkdir -p "$scratch/state/lists/partial" "$scratch/cache/archives/partial"
  apt update
  apt install --yes --download-only base-files python3 ca-certificates libgomp1 libstdc++6 >"$scratch/log" 2>&1 ||
    { cat "$scratch/log" >&2 && exit 1; }
  mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/usr/lib" "$root/usr/lib64" "$root/var/lib/dpkg/status.d"
  for folder in bin sbin lib lib64; do
    ln -s "usr/$folder" "$root/$folder"
  done
  for package in "$scratch"/cache/archives/*.deb; do
    name=$(dpkg-deb --field "$package" Package)
    case $name in
      # What only installing takes, or only a terminal.
      debconf | dpkg | tar | mawk | openssl | openssl-provider-legacy | libacl1 | libmd0 | libselinux1 | libpcre2-8-0) continue ;;
      libdebconfclient0 | libreadline8* | readline-common | libncursesw6 | libtinfo6 | libdb5.3*) continue ;;
    esac
    unpack "$package"
    dpkg-deb --field "$package" >"$root/var/lib/dpkg/status.d/$name" # for scanners of images, as in distroless ones
  done
  find "$root/usr/share/doc" -mindepth 2 ! -name copyright ! -type d -delete
  find "$root/usr/bin" -mindepth 1 ! -name 'python3*' -delete
  rm -rf "$root"/etc/profile* "$root"/etc/update-motd.d "$root"/etc/skel "$root"/usr/share/base-files "$root"/usr/share/python3 \
    "${root:?}"/boot "${root:?}"/home "${root:?}"/media "${root:?}"/mnt "${root:?}"/opt "${root:?}"/srv "$root"/var/lock "$root"/var/tmp
  cat "$root"/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
  printf 'mlis:x:10001:10001:ML inference server:/tmp:/usr/sbin/nologin\n' >"$root/etc/passwd"
  printf 'mlis:x:10001:\n' >"$root/etc/group"
  printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"
  mkdir -p "$root/cache" "$root/model" "$root/proc" "$root/sys" "$root/dev" "$root/tmp" "$root/usr/local/bin"
  chown 10001:10001 "$root/cache"
  find "$root" -type d -perm /6000 -exec chmod a-s {} +
  chmod 1777 "$root/tmp"
}

python_of_the_root() {
  python=$(readlink "$root/usr/bin/python3") || fail "$root has no Python yet: the step 'system' comes first"
  site="$root/usr/local/lib/$python/dist-packages"
}

install() { # arguments of uv pip install
  "$BUILDER/bin/uv" pip install --quiet --no-config --python "$BUILDER/bin/python" --python-version "${python#python}" \
    --python-platform "$platform" --target "$site" --link-mode copy "$@"
}

# A root that is read-only cannot keep what Python would compile at each start. Bytecode is the same on all processors.
compile() { # folders
  if [ "$(dpkg --print-architecture)" = "$architecture" ]; then
    compiler="$root/$loader --library-path $root/usr/lib/$machine $root/usr/bin/$python"
  else
    compiler=$(command -v "$python") || fail "bytecode needs $python on this machine: apt-get install $python"
  fi
  # shellcheck disable=SC2086 # the compiler is a command line
  PYTHONHOME="$root/usr" $compiler -B -E -S -m compileall -q --invalidation-mode unchecked-hash -s "$root" -p / "$@"
}

packages() { # extras, one word each
  python_of_the_root
  for extra in "$@"; do
    set -- "$@" --extra "$extra"
    shift
  done
  install --only-binary :all: --require-hashes --constraints requirements.lock --requirements pyproject.toml "$@"
  rm -rf "${site:?}/bin" "$site/.lock"
  compile "$site" "$root/usr/lib/$python"
}

program() {
  python_of_the_root
  "$BUILDER/bin/uv" build --quiet --no-config --wheel --no-build-isolation --python "$BUILDER/bin/python" \
    --out-dir "$scratch/wheel" .
  install --no-deps --no-index "$scratch"/wheel/*.whl
  rm -rf "${site:?}/bin" "$site/.lock"
  cat >"$root/usr/local/bin/mlis" <<'END'
#!/usr/bin/python3 -I
from ml_inference_server.cli import program

if __name__ == "__main__":
    program()
END
  chmod 755 "$root/usr/local/bin/mlis"
  compile "$site/ml_inference_server"
}

case $step in
  system) system ;;
  packages)
    # shellcheck disable=SC2086 # one argument for each word
    packages ${4:-}
    ;;
  program) program ;;
  *) fail "$step is neither system nor packages nor program" ;;
esac
