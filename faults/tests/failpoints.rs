//! A crash at every named failpoint of the durable path, at its first, second and fifth visit, and an error or a full
//! disk at each (P1, P4, P5, P6, P22); tasks that kill (P13), hang (P12) or exhaust (P23) whoever takes them.
//!
//! Which points there are is read from the tables in the sources. A crash ends the process at once, as kill -9 would.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use faults::{Cluster, Job, Launch, Permit, Settings, failpoints, in_parallel, until};

const LIMIT: Duration = Duration::from_secs(60);
const VISITS: [usize; 3] = [1, 2, 5];
const COORDINATOR: &str = "coordinator/src";
const NODE: &str = "node";
/// Inputs that lie on the coordinator's machine are used in place: there is nothing to link. Nobody forgets a job.
const NOT_HERE: [&str; 2] = ["input.link", "job.forget"];

/// `action` at the `visit`th time.
fn at(point: &str, visit: usize, action: &str) -> String {
    match visit {
        1 => format!("{point}=1*{action}"),
        _ => format!("{point}={}*off->1*{action}", visit - 1),
    }
}

/// Runs `crash` for every point and visit; every point has to be met at least once.
fn check_all(folder: &str, crash: impl Fn(&str) -> Result<bool> + Sync) -> Result<()> {
    let crashes = in_parallel(failpoints(folder)?, |point| {
        let mut crashes = 0;
        for visit in VISITS {
            if !crash(&at(&point, visit, "return(abort)"))? {
                break;
            }
            crashes += 1;
        }
        eprintln!("{point}: {crashes} crashes");
        Ok((point, crashes))
    });
    let crashes = crashes.into_iter().collect::<Result<Vec<_>>>()?;
    let never: Vec<&String> = crashes
        .iter()
        .filter(|(point, crashes)| *crashes == 0 && !NOT_HERE.contains(&point.as_str()))
        .map(|(point, _)| point)
        .collect();
    ensure!(never.is_empty(), "never met: {never:?}");
    Ok(())
}

#[test]
fn a_coordinator_that_crashes_at_any_failpoint_resumes_with_the_same_bytes() -> Result<()> {
    let job = Job::short();
    job.golden()?;
    check_all(COORDINATOR, |points| crash_coordinator(&job, points))
}

/// Whether it crashed.
fn crash_coordinator(job: &Job, points: &str) -> Result<bool> {
    let mut cluster = Cluster::empty(Settings::default(), Permit::one())?;
    let mut coordinator = cluster.spawn_coordinator(&Launch::failing(points))?;
    cluster.start_nodes(2)?;
    let mut submission = cluster.submit(job)?;
    let crashed = until(LIMIT, || {
        let finished = submission.process.ended()?.is_some();
        Ok(if coordinator.ended()?.is_some() { Some(true) } else { finished.then_some(false) })
    })?;
    match crashed {
        Some(true) => drop(cluster.start_coordinator()?),
        Some(false) => cluster.adopt_coordinator(coordinator),
        None => return coordinator.expired(&format!("{points}: a crash or the end of the job")),
    }
    cluster.finish(submission, LIMIT)?;
    Ok(crashed == Some(true))
}

#[test]
fn a_node_that_crashes_at_any_failpoint_is_replaced_with_the_same_bytes() -> Result<()> {
    let job = Job::short();
    job.golden()?;
    check_all(NODE, |points| crash_node(&job, points))
}

/// Whether it crashed.
fn crash_node(job: &Job, points: &str) -> Result<bool> {
    let mut cluster = Cluster::new()?;
    // No memory for carries: the files are part of the path.
    cluster.start_node_as(
        "a",
        Launch { args: vec!["--memory-budget".into(), "1KiB".into()], ..Launch::failing(points) },
    )?;
    let mut submission = cluster.submit(job)?;
    let mut node = cluster.take_node("a")?;
    let crashed = until(LIMIT, || {
        let finished = submission.process.ended()?.is_some();
        Ok(if node.ended()?.is_some() { Some(true) } else { finished.then_some(false) })
    })?;
    match crashed {
        Some(true) => cluster.start_nodes(2)?,
        Some(false) => {}
        None => return node.expired(&format!("{points}: a crash or the end of the job")),
    }
    cluster.finish(submission, LIMIT)?;
    Ok(crashed == Some(true))
}

#[test]
fn an_error_or_a_full_disk_at_any_failpoint_is_survived_or_said_and_never_believed() -> Result<()> {
    let job = Job::short();
    job.golden()?;
    let points = failpoints(COORDINATOR)?;
    let failures = ["return", "return(full)"]
        .into_iter()
        .flat_map(|action| points.iter().map(move |point| (point, action)));
    let results = in_parallel(failures, |(point, action)| {
        let how = fail_coordinator(&job, &at(point, 1, action))?;
        eprintln!("{point}={action}: {how}");
        Ok(())
    });
    results.into_iter().collect()
}

/// How the job went on.
fn fail_coordinator(job: &Job, points: &str) -> Result<&'static str> {
    let mut cluster = Cluster::empty(Settings::default(), Permit::one())?;
    let mut coordinator = cluster.spawn_coordinator(&Launch::failing(points))?;
    cluster.start_nodes(2)?;
    let mut submission = cluster.submit(job)?;
    let over = until(LIMIT, || {
        Ok((submission.process.ended()?.is_some() || coordinator.ended()?.is_some()).then_some(()))
    })?;
    if over.is_none() {
        return coordinator.expired(&format!("{points}: the end of the job or of itself"));
    }
    ensure!(!coordinator.stderr().contains("panicked"), "{points}: {}", coordinator.stderr());
    if let Some(code) = coordinator.ended()? {
        ensure!(coordinator.stderr().contains("error: "), "{points}: exit {code} without a word");
        cluster.start_coordinator()?;
        cluster.finish(submission, LIMIT)?;
        return Ok("the coordinator stopped, resumed when started again");
    }
    cluster.adopt_coordinator(coordinator);
    let end = cluster.end(submission, LIMIT)?;
    if end.exit == 0 {
        cluster.assert_identical(job, &end.output)?;
        return Ok("went on");
    }
    ensure!(end.stderr.contains("error: "), "{points}: exit {} without a word", end.exit);
    ensure!(!end.output.exists(), "{points}: partial results are visible");
    cluster.run(job, LIMIT)?;
    Ok("failed, done when submitted again")
}

#[test]
fn a_task_that_kills_three_nodes_is_given_up_and_the_rest_finishes() -> Result<()> {
    let mut cluster = Cluster::new()?;
    // Every node that begins to solve this layer dies of it.
    let poisoned = Launch::failing("node.execute=return(abort:solve-9)");
    let job = Job::short();
    let mut submission = cluster.submit(&job)?;
    let mut dead = 0;
    for round in 0..12 {
        let name = format!("n{round}");
        cluster.start_node_as(&name, poisoned.clone())?;
        let mut node = cluster.take_node(&name)?;
        until(
            LIMIT,
            || Ok((node.ended()?.is_some() || submission.process.ended()?.is_some()).then_some(())),
        )?;
        if submission.process.ended()?.is_some() {
            break;
        }
        dead += 1;
    }
    let end = cluster.end(submission, LIMIT)?;
    eprintln!("P13: exit {} after {dead} dead nodes: {}", end.exit, end.stderr.lines().last().unwrap_or(""));
    ensure!(end.exit == 4, "exit {}\n{}", end.exit, end.stderr);
    ensure!(dead == 3, "{dead} nodes died");
    Ok(())
}

#[test]
fn a_task_that_hangs_on_one_node_is_done_by_another_and_the_node_is_named() -> Result<()> {
    for task in ["capture", "solve-9"] {
        let settings = Settings { hung: Duration::from_secs(1), ..Settings::default() };
        let mut cluster = Cluster::launched(settings, Launch::default(), Permit::one())?;
        cluster.start_node_as("a", Launch::failing(&format!("node.execute=return(hang:{task})")))?;
        cluster.wait_attached("a", 1)?;
        let job = Job::medium();
        let mut submission = cluster.submit(&job)?;
        let begun = Instant::now();
        let hung = |cluster: &mut Cluster| {
            let status = cluster.node_status("a")?;
            Ok(status.is_some_and(|node| node["state"] == "hung").then_some(()))
        };
        cluster.expect("the hung node to be reported", LIMIT, hung)?;
        eprintln!("P12: {task}: reported {:.1?} after the job was submitted", begun.elapsed());
        ensure!(submission.process.ended()?.is_none(), "the job ended without a node");
        cluster.start_node("b")?;
        let end = cluster.end(submission, LIMIT)?;
        ensure!(end.exit == 0, "exit {}\n{}", end.exit, end.stderr);
        cluster.assert_identical(&job, &end.output)?;
        ensure!(end.stderr.contains("node `a`: no progress for 1.0 s"), "{}", end.stderr);
    }
    Ok(())
}

#[test]
fn a_task_that_has_memory_enough_without_company_succeeds_on_its_own_node() -> Result<()> {
    let settings = Settings { threads: 3, ..Settings::default() };
    let mut cluster = Cluster::launched(settings, Launch::default(), Permit::one())?;
    // As if three tasks at once were one too many.
    cluster.start_node_as("a", Launch::failing("node.execute=return(crowded:capture)"))?;
    cluster.wait_attached("a", 1)?;
    let submission = cluster.submit(&Job::short())?;
    let end = cluster.end(submission, LIMIT)?;
    ensure!(end.exit == 0, "exit {}\n{}", end.exit, end.stderr);
    cluster.assert_identical(&Job::short(), &end.output)?;
    let retries = end.stderr.matches("RETRY").count();
    eprintln!("P23: {retries} captures were tried again without company");
    ensure!(retries > 0, "{}", end.stderr);
    Ok(())
}

#[test]
fn what_a_quantize_leaves_that_crashes_while_it_places_results_is_removed_by_the_next() -> Result<()> {
    let mut cluster = Cluster::empty(Settings::default(), Permit::one())?;
    let output = cluster.folder().join("out");
    let hidden = |cluster: &Cluster, what: &str| {
        let found = std::fs::read_dir(cluster.folder())?.flatten();
        let names = found.map(|entry| entry.file_name().to_string_lossy().into_owned());
        anyhow::Ok(names.filter(|name| name.starts_with(".out.") && name.contains(what)).count())
    };
    let quantize = |cluster: &mut Cluster, job: &Job, launch: &Launch| {
        let mut arguments = vec!["quantize".to_string(), "--force".into(), "--output".into()];
        arguments.push(output.to_string_lossy().into_owned());
        arguments.extend(job.arguments());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        cluster.bare_as("quantize", &arguments, launch)?.wait(LIMIT)
    };
    // At the first visit the coordinator inside has its results, at the second they are brought to their place.
    let crash = Launch::failing("export.rename=1*off->1*return(abort)");
    for job in [Job::short(), Job::short().with(&["--seed", "7"])] {
        let old = usize::from(output.exists());
        ensure!(quantize(&mut cluster, &job, &crash)? != 0, "it did not crash");
        let left = (hidden(&cluster, ".partial-")?, hidden(&cluster, ".old-")?);
        ensure!(left == (1, old), "a crash leaves new results, and old ones if there were any: {left:?}");
        ensure!(quantize(&mut cluster, &job, &Launch::default())? == 0, "{}", cluster.logs.tails());
        cluster.assert_identical(&job, &output)?;
        ensure!(hidden(&cluster, "")? == 0, "something is left");
    }
    Ok(())
}

#[test]
fn a_coordinator_that_crashes_while_it_forgets_a_job_forgets_it_when_told_again() -> Result<()> {
    let mut cluster =
        Cluster::launched(Settings::default(), Launch::failing("job.forget=1*return(abort)"), Permit::one())?;
    cluster.start_nodes(1)?;
    cluster.run(&Job::short(), LIMIT)?;
    let id = cluster.jobs()?[0]["job"].as_str().unwrap_or_default().to_string();
    let crashed = cluster.ask(&["forget", &id])?;
    ensure!(crashed.exit != 0, "{crashed:?}");
    cluster.start_coordinator()?;
    ensure!(cluster.jobs()?.len() == 1, "half forgotten, it is still known");
    let forgotten = cluster.ask(&["forget", &id])?;
    ensure!(forgotten.exit == 0 && forgotten.stdout.contains("forgotten"), "{forgotten:?}");
    ensure!(cluster.jobs()?.is_empty(), "it is still there");
    let left = faults::files_below(&cluster.state_dir().join("jobs"))?;
    ensure!(left.is_empty(), "left: {left:?}");
    cluster.run(&Job::short(), LIMIT).map(drop)
}

#[test]
fn a_node_whose_device_hangs_does_not_hold_the_others_up() -> Result<()> {
    let settings = Settings { hung: Duration::from_secs(1), ..Settings::default() };
    let mut cluster = Cluster::launched(settings, Launch::default(), Permit::one())?;
    cluster.start_node_as("a", Launch::failing("node.execute=return(hang:capture)"))?;
    cluster.start_node("b")?;
    cluster.start_node("c")?;
    let begun = Instant::now();
    cluster.run(&Job::medium(), LIMIT)?;
    eprintln!("P12: one of three nodes hangs: {:.1?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_task_short_of_memory_is_tried_alone_then_elsewhere_and_then_costs_its_layer_alone() -> Result<()> {
    let short = Launch::failing("node.execute=return(memory:solve-9)");
    for both in [false, true] {
        let mut cluster = Cluster::new()?;
        cluster.start_node_as("a", short.clone())?;
        cluster.start_node_as("b", if both { short.clone() } else { Launch::default() })?;
        let submission = cluster.submit(&Job::short())?;
        if !both {
            cluster.finish(submission, LIMIT)?;
            continue;
        }
        let end = cluster.end(submission, LIMIT)?;
        eprintln!("P23: exit {}: {}", end.exit, end.stderr.lines().last().unwrap_or(""));
        ensure!(end.exit == 4, "exit {}\n{}", end.exit, end.stderr);
        ensure!(end.stderr.contains("the memory did not suffice 3 times"), "{}", end.stderr);
        let log = cluster.coordinator()?.stderr();
        ensure!(end.stderr.matches("FAILED").count() == 1, "one layer fails: {}\n{log}", end.stderr);
    }
    Ok(())
}

/// Killed between placing its results and saying so, and given again: the command finds them, and leaves every file alone.
#[test]
fn a_quantize_killed_just_after_its_results_were_placed_says_that_they_are_there() -> Result<()> {
    let mut cluster = Cluster::empty(Settings::default(), Permit::one())?;
    let output = cluster.folder().join("out");
    let state = cluster.folder().join(".out.halfstep");
    let job = Job::short();
    let quantize = |cluster: &mut Cluster, job: &Job, launch: &Launch| {
        let mut arguments = vec!["quantize".to_string(), "--output".into()];
        arguments.push(output.to_string_lossy().into_owned());
        arguments.extend(job.arguments());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut process = cluster.bare_as("quantize", &arguments, launch)?;
        anyhow::Ok((process.wait(LIMIT)?, process.stderr()))
    };
    // At the first visit the coordinator inside has its results, at the second they have just got their name.
    let crash = Launch::failing("export.folder=1*off->1*return(abort)");
    ensure!(quantize(&mut cluster, &job, &crash)?.0 != 0, "it did not crash");
    ensure!(output.is_dir() && state.is_dir(), "results and state are there");
    let touched = || -> Result<Vec<_>> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(&output)? {
            let entry = entry?;
            all.push((entry.file_name(), entry.metadata()?.modified()?));
        }
        all.sort();
        Ok(all)
    };
    let before = touched()?;
    let (code, said) = quantize(&mut cluster, &job, &Launch::default())?;
    ensure!(code == 0 && said.contains("Done already") && !said.contains("SOLVED"), "exit {code}: {said}");
    ensure!(touched()? == before, "no file is written again");
    ensure!(!state.exists(), "the state of the killed run is of no use any more");
    cluster.assert_identical(&job, &output)?;
    // Another job, a file too many, a damaged file: refused as ever, and left alone.
    let other = job.clone().with(&["--seed", "7"]);
    let (code, said) = quantize(&mut cluster, &other, &Launch::default())?;
    ensure!(code == 78 && said.contains("expected an empty or absent folder"), "exit {code}: {said}");
    std::fs::write(output.join("thesis.txt"), "mine")?;
    let (code, said) = quantize(&mut cluster, &job, &Launch::default())?;
    ensure!(code == 78, "exit {code}: {said}");
    std::fs::remove_file(output.join("thesis.txt"))?;
    let model = output.join("model.onnx");
    let mut bytes = std::fs::read(&model)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&model, bytes)?;
    let (code, said) = quantize(&mut cluster, &job, &Launch::default())?;
    ensure!(code == 78, "exit {code}: {said}");
    ensure!(!state.exists(), "nothing was begun");
    Ok(())
}
