-- Run once, when the volume is empty: MLflow's role, which is no superuser, and what belongs to it.
\getenv password MLFLOW_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'password';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
REVOKE CONNECT ON DATABASE postgres, template1, mlflow, mlflow_auth FROM PUBLIC;
