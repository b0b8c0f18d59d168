set positional-arguments

# Without a Bun of its own, a machine with Node runs it from npm.
bun := `command -v bun >/dev/null && echo bun || echo npx -y bun@1.4.5`

# List the recipes
default:
    @just --list

# Start the breaker, e.g. just run --port 5556
[no-exit-message]
run *args:
    {{ bun }} --no-env-file breaker.ts "$@"

# Stop the breaker that runs on this machine
[no-exit-message]
stop *args:
    {{ bun }} --no-env-file breaker.ts stop "$@"

# Ask the running breaker: TRUE or FALSE
[no-exit-message]
status *args:
    {{ bun }} --no-env-file breaker.ts status "$@"

# Look at the account once and say what it costs
[no-exit-message]
check *args:
    {{ bun }} --no-env-file breaker.ts check "$@"

# See it trip within half a minute, without an account
[no-exit-message]
drill *args:
    {{ bun }} --no-env-file breaker.ts --drill "$@"

# Install the packages, then check types, format and behaviour
test *args: packages
    {{ bun }} check
    {{ bun }} fmt --check
    {{ bun }} test --coverage "$@"

# Format everything
fmt:
    {{ bun }} fmt

# Measure speed, processor time, memory and start-up, side by side with others
bench *args: packages
    {{ bun }} --no-env-file bench/bench.ts "$@"

# Install the packages of the lock file
[private]
packages:
    {{ bun }} install --frozen-lockfile

# The file of the service, for the shell: a systemd user unit, on macOS a launchd agent
service := if os() == "macos" { '"$HOME/Library/LaunchAgents/local.breaker.plist"' } else { '"${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user/breaker.service"' }

# Install the README's service for this user, and start it
[linux]
[no-exit-message]
install: (service-file "systemctl" "ini")
    @systemctl --user daemon-reload && systemctl --user enable breaker && systemctl --user restart breaker || \
      { echo 'breaker: systemd did not start the service; log in to a desktop and run: systemctl --user enable --now breaker' >&2; exit 1; }
    @echo "breaker: started; its log: journalctl --user -u breaker"

# Install the README's service for this user, and start it
[macos]
[no-exit-message]
install: (service-file "launchctl" "xml")
    @launchctl bootout gui/$(id -u)/local.breaker 2>/dev/null || true
    @for try in 1 2 3 4 5; do launchctl bootstrap gui/$(id -u) {{ service }} && exit 0; sleep 1; done; \
      echo 'breaker: launchd did not start the service; log in to the desktop and try again' >&2; exit 1
    @echo "breaker: started; its log: ~/Library/Logs/breaker.log"

# Stop the service and remove it
[linux]
[no-exit-message]
uninstall:
    @systemctl --user disable --now breaker || echo 'breaker: systemd did not stop the service; stop it with: just stop' >&2
    @rm -f {{ service }}
    @systemctl --user daemon-reload 2>/dev/null || true
    @echo 'breaker: removed the service'

# Stop the service and remove it
[macos]
[no-exit-message]
uninstall:
    @launchctl bootout gui/$(id -u)/local.breaker || echo 'breaker: launchd did not stop the service; stop it with: just stop' >&2
    @rm -f {{ service }}
    @echo 'breaker: removed the service'

# Write the README's service with the paths of this machine
[no-exit-message]
[private]
service-file manager language:
    #!/usr/bin/env bash
    set -euo pipefail
    fail() { echo "breaker: $1" >&2; exit 1; }
    command -v {{ manager }} >/dev/null || fail "there is no {{ manager }} here; start the breaker by other means, with: just run"
    # The Bun that npx brings lies in a cache, which may be emptied at any time.
    bun=$(command -v bun || true)
    case $bun in "" | */_npx/*) fail "a service needs a Bun that stays, which npx is not; install it from https://bun.sh and try again" ;; esac
    case $bun$PWD$HOME in *[\"\\$%\&\|\<\>]*) fail "a path of the service holds one of \" \\ \$ % & | < >; move the folder $PWD" ;; esac
    # Fetches zod now, so that the service starts without a network.
    "$bun" -i --no-env-file breaker.ts --version >/dev/null
    file={{ service }}
    mkdir -p "$(dirname "$file")"
    awk -v fence='```{{ language }}' 'inside && /^```$/ { exit } inside; $0 == fence { inside = 1 }' README.md |
      sed -e "s|/path/to/bun|$bun|" -e "s|/path/to/breaker.ts|$PWD/breaker.ts|" -e "s|/Users/you|$HOME|" >"$file"
    echo "breaker: wrote $file"
