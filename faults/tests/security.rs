//! Who is let in: no, foreign, expired and misused certificates, plaintext where it must not be (P17, P18).
//!
//! Through the real binary. The table of roles per RPC is walked where it is defined.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use faults::{Answer, Cluster, Job, Launch, Permit, Settings};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, DnType, Issuer, KeyPair, date_time_ymd};
use x509_parser::der_parser::oid::Oid;
use x509_parser::pem::parse_x509_pem;

const LIMIT: Duration = Duration::from_secs(60);
const BAD_CONFIGURATION: i32 = 78;
const CLIENT_COMMANDS: [&[&str]; 2] = [&["nodes"], &["status"]];

fn certificates(cluster: &mut Cluster, name: &str) -> Result<PathBuf> {
    let folder = cluster.folder().join(name);
    let mut made =
        cluster.bare("certs", &["certs", "--dir", &folder.to_string_lossy(), "--host", "127.0.0.1"])?;
    ensure!(made.wait(LIMIT)? == 0, "certs: {}", made.stderr());
    Ok(folder)
}

/// A coordinator with TLS, and its certificates.
fn secured() -> Result<(Cluster, PathBuf)> {
    let mut cluster = Cluster::empty(Settings::default(), Permit::one())?;
    let certs = certificates(&mut cluster, "certs")?;
    cluster.settings.certs = Some(certs.clone());
    cluster.start_coordinator()?;
    Ok((cluster, certs))
}

/// A copy of a folder of certificates, to be changed.
fn copied(certs: &Path, name: &str) -> Result<PathBuf> {
    let folder = certs.with_file_name(name);
    fs::create_dir(&folder)?;
    for path in faults::files_below(certs)? {
        fs::copy(&path, folder.join(path.file_name().unwrap()))?;
    }
    Ok(folder)
}

/// Asks with these certificates and wants a refusal that names the reason.
fn refused(cluster: &mut Cluster, certs: Option<PathBuf>, reasons: &[&str]) -> Result<()> {
    let own = std::mem::replace(&mut cluster.settings.certs, certs);
    for command in CLIENT_COMMANDS {
        let Answer { exit, stdout, stderr } = cluster.ask(command)?;
        eprintln!("{command:?}: exit {exit}: {}", stderr.trim());
        ensure!(exit != 0, "{command:?} was answered: {stdout}");
        ensure!(stderr.lines().any(|line| line.starts_with("error: ")), "{stderr}");
        ensure!(!stderr.contains("panicked"), "{stderr}");
        let known = reasons.iter().any(|reason| stderr.to_lowercase().contains(reason));
        ensure!(known, "expected one of {reasons:?}: {stderr}");
    }
    cluster.settings.certs = own;
    Ok(())
}

/// Starts a node with these certificates: it must say why it is not let in, and not be among the nodes.
fn node_refused(cluster: &mut Cluster, certs: Option<PathBuf>, reasons: &[&str]) -> Result<()> {
    let own = std::mem::replace(&mut cluster.settings.certs, certs);
    cluster.start_node("intruder")?;
    cluster.settings.certs = own;
    let said = cluster.expect("the node to say why it waits", LIMIT, |cluster| {
        let node = cluster.node("intruder")?;
        let stderr = node.stderr();
        let line = stderr.lines().find(|line| line.contains("Waiting for") || line.starts_with("error: "));
        Ok(line.map(str::to_string))
    })?;
    eprintln!("node: {said}");
    let known = reasons.iter().any(|reason| said.to_lowercase().contains(reason));
    ensure!(known, "expected one of {reasons:?}: {said}");
    ensure!(cluster.node_status("intruder")?.is_none(), "the node was let in");
    cluster.kill_node("intruder")
}

#[test]
fn with_their_certificates_all_roles_work_and_keys_are_private() -> Result<()> {
    let (mut cluster, certs) = secured()?;
    cluster.start_nodes(2)?;
    cluster.run(&Job::short(), LIMIT)?;
    for path in faults::files_below(&certs)? {
        let mode = fs::metadata(&path)?.permissions().mode() & 0o777;
        ensure!(
            !path.to_string_lossy().contains("-key") || mode == 0o600,
            "{}: mode {mode:o}",
            path.display()
        );
    }
    Ok(())
}

#[test]
fn plaintext_and_a_foreign_authority_are_refused() -> Result<()> {
    let (mut cluster, _) = secured()?;
    let foreign = certificates(&mut cluster, "foreign")?;
    refused(&mut cluster, Some(foreign.clone()), &["unknownissuer", "certificate"])?;
    node_refused(&mut cluster, Some(foreign), &["unknownissuer", "certificate"])?;
    let plaintext = ["tls", "certificate", "insecure", "plaintext"];
    refused(&mut cluster, None, &plaintext)?;
    node_refused(&mut cluster, None, &plaintext)
}

#[test]
fn a_certificate_that_is_not_there_is_named() -> Result<()> {
    let (mut cluster, certs) = secured()?;
    let empty = copied(&certs, "empty")?;
    fs::remove_file(empty.join("client.pem"))?;
    refused(&mut cluster, Some(empty), &["client.pem"])
}

#[test]
fn expired_certificates_are_refused() -> Result<()> {
    let (mut cluster, certs) = secured()?;
    let expired = copied(&certs, "expired")?;
    for role in ["client", "node"] {
        expire(&expired, role)?;
    }
    refused(&mut cluster, Some(expired.clone()), &["expired"])?;
    node_refused(&mut cluster, Some(expired), &["expired"])
}

/// Signs a role's certificate again, by the same authority, with the same subject and extensions, for a year long past.
fn expire(certs: &Path, role: &str) -> Result<()> {
    let read = |name: &str| fs::read_to_string(certs.join(name));
    let (_, pem) = parse_x509_pem(read(&format!("{role}.pem"))?.as_bytes())?;
    let old = pem.parse_x509()?;
    let numbers =
        |oid: &Oid| oid.iter().map(|id| id.collect::<Vec<u64>>()).context("object id of more than 64 bits");
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    params.distinguished_name = DistinguishedName::new();
    for attribute in old.subject().iter_attributes() {
        params
            .distinguished_name
            .push(DnType::from_oid(&numbers(attribute.attr_type())?), attribute.as_str()?);
    }
    // The key's identifiers are made anew when it is signed.
    for extension in
        old.extensions().iter().filter(|extension| !extension.oid.to_id_string().ends_with(".35"))
    {
        let mut copy = CustomExtension::from_oid_content(&numbers(&extension.oid)?, extension.value.to_vec());
        copy.set_criticality(extension.critical);
        params.custom_extensions.push(copy);
    }
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem")?, KeyPair::from_pem(&read("ca-key.pem")?)?)?;
    let key = KeyPair::from_pem(&read(&format!("{role}-key.pem"))?)?;
    fs::write(certs.join(format!("{role}.pem")), params.signed_by(&key, &issuer)?.pem())?;
    Ok(())
}

#[test]
fn a_certificate_of_another_role_is_refused() -> Result<()> {
    let (mut cluster, certs) = secured()?;
    let swapped = copied(&certs, "swapped")?;
    for (to, from) in [("client", "node"), ("node", "client")] {
        for ending in [".pem", "-key.pem"] {
            fs::copy(certs.join(format!("{from}{ending}")), swapped.join(format!("{to}{ending}")))?;
        }
    }
    refused(&mut cluster, Some(swapped.clone()), &["role", "permission", "may not", "not allowed"])?;
    node_refused(&mut cluster, Some(swapped), &["role", "permission", "may not", "not allowed"])
}

#[test]
fn plaintext_on_an_address_that_is_not_loopback_is_bad_configuration() -> Result<()> {
    let mut cluster = Cluster::empty(Settings::default(), Permit::one())?;
    let state = cluster.folder().join("state").to_string_lossy().into_owned();
    let commands: [&[&str]; 2] = [
        &["coordinator", "--state-dir", &state, "--listen", "0.0.0.0:0", "--insecure"],
        &["node", "--coordinator", "127.0.0.1:1", "--listen", "0.0.0.0:0", "--insecure"],
    ];
    for command in commands {
        let mut process = cluster.bare(command[0], command)?;
        let code = process.wait(LIMIT)?;
        eprintln!("{command:?}: exit {code}: {}", process.stderr().trim());
        ensure!(code == BAD_CONFIGURATION, "{command:?}: exit {code}: {}", process.stderr());
        ensure!(process.stderr().contains("loopback"), "{}", process.stderr());
    }
    // Nor is anybody far away spoken to in plain text.
    let far = ["--coordinator", "192.0.2.1:7421", "--insecure"];
    for command in ["nodes", "node"] {
        let mut process = cluster.bare(command, &[&[command][..], &far].concat())?;
        let code = process.wait(LIMIT)?;
        let said = process.stderr();
        ensure!(code == BAD_CONFIGURATION && said.contains("loopback"), "{command}: exit {code}: {said}");
    }
    // Nothing is chosen by default either.
    let mut process =
        cluster.bare("coordinator", &["coordinator", "--state-dir", &state, "--listen", "127.0.0.1:0"])?;
    let code = process.wait(LIMIT)?;
    ensure!(code != 0 && process.stderr().contains("--insecure"), "exit {code}: {}", process.stderr());
    Ok(())
}

#[test]
fn secrets_are_neither_in_logs_nor_arguments() -> Result<()> {
    let (mut cluster, certs) = secured()?;
    cluster.start_node_as(
        "a",
        Launch { env: vec![("HALFSTEP_LOG".into(), "trace".into())], ..Launch::default() },
    )?;
    cluster.run(&Job::short(), LIMIT)?;
    let key: String = fs::read_to_string(certs.join("node-key.pem"))?.lines().skip(1).take(1).collect();
    for pid in [cluster.node("a")?.pid(), cluster.coordinator()?.pid()] {
        let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        ensure!(!arguments.contains(&key) && !arguments.contains("PRIVATE KEY"));
    }
    for log in [cluster.node("a")?.stderr(), cluster.coordinator()?.stderr()] {
        ensure!(!log.contains(&key) && !log.contains("PRIVATE KEY"));
    }
    Ok(())
}
