# Without a Bun of its own, a machine with Node runs it from npm.
bun := `command -v bun >/dev/null && echo bun || echo npx -y bun@1.4.5`

# List the recipes
default:
    @just --list

# Start the breaker, e.g. just run --port 5556
run *args:
    {{ bun }} --no-env-file breaker.ts {{ args }}

# Stop the breaker that runs on this machine
stop *args:
    {{ bun }} --no-env-file breaker.ts stop {{ args }}

# Ask the running breaker: TRUE or FALSE
status *args:
    {{ bun }} --no-env-file breaker.ts status {{ args }}

# Look at the account once and say what it costs
check *args:
    {{ bun }} --no-env-file breaker.ts check {{ args }}

# See it trip within half a minute, without an account
drill *args:
    {{ bun }} --no-env-file breaker.ts --drill {{ args }}

# Install the packages, then check types, format and behaviour
test *args: packages
    {{ bun }} check
    {{ bun }} fmt --check
    {{ bun }} test --coverage {{ args }}

# Format everything
fmt:
    {{ bun }} fmt

# Measure speed, processor time, memory and start-up, side by side with others
bench *args: packages
    {{ bun }} --no-env-file bench/bench.ts {{ args }}

# Install the packages of the lock file
[private]
packages:
    {{ bun }} install --frozen-lockfile
