#!/bin/sh
# How the pipelines of a namespace log in: a user of MLflow, and its name and password as the secret mlflow-login there.
#
#     sh mlflow/kubernetes/login.sh NAMESPACE [USER]
#
# The user is no administrator: it owns what it makes, and has basic_auth.ini's default_permission on the rest. If it
# exists, it gets a new password. The password is made up here, and passes through pipes only.
set -eu
namespace=${1:?"usage: login.sh NAMESPACE [USER]"}
user=${2:-pipelines-$namespace}
password=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')

kubectl get namespace "$namespace" >/dev/null
# Inside the server's pod, where the administrator's password is.
printf '%s\n%s\n' "$user" "$password" | kubectl --namespace mlflow exec --stdin deployment/mlflow --container mlflow -- python -c '
import os, requests
admin = "admin", os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
users, login = "http://localhost:5000/api/2.0/mlflow/users/", {"username": input(), "password": input()}
answer = requests.post(users + "create", json=login, auth=admin)
if answer.json().get("error_code") == "RESOURCE_ALREADY_EXISTS":
    answer = requests.patch(users + "update-password", json=login, auth=admin)
if not answer.ok:
    raise SystemExit(answer.text)
'
kubectl --namespace "$namespace" apply -f - <<END
apiVersion: v1
kind: Secret
metadata:
  name: mlflow-login
stringData:
  username: "$user"
  password: "$password"
END
