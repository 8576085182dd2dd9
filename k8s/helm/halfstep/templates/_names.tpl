{{- define "halfstep.labels" -}}
app.kubernetes.io/name: halfstep
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "halfstep.object" -}}
{{ include "halfstep.labels" . }}
app.kubernetes.io/part-of: halfstep
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "halfstep.claim" -}}
{{ .Values.data.claim | default (printf "%s-data" .Release.Name) }}
{{- end }}
