#!/bin/sh
# secrets.template.yaml with a random value (192 bits) wherever it has none, to standard output.
set -eu
while IFS= read -r line; do
  case $line in
    *"#"*) ;;
    "  "*:) printf '%s "%s"\n' "$line" "$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" ;;
    *) printf '%s\n' "$line" ;;
  esac
done < "$(dirname "$0")/secrets.template.yaml"
