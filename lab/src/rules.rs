//! Rules for the lab's engine, and the test file that they find.

use std::fs;
use std::path::Path;

/// The EICAR test file. It stands here backwards, so that neither this source nor a program built from it
/// is found by an engine.
pub fn eicar() -> Vec<u8> {
    let backwards = "*H+H$!ELIF-TSET-SURIVITNA-DRADNATS-RACIE$}7)CC7)^P(45XZP\\4[PA@%P!O5X";
    backwards.bytes().rev().collect()
}

/// Writes a folder of rules: one that finds EICAR anywhere in a file, and a few that find nothing usual.
pub fn write_rules(folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let text = String::from_utf8(eicar())?.replace('\\', "\\\\");
    let eicar = format!(
        "rule EICAR_Test_File {{\n  meta:\n    description = \"the EICAR test file\"\n  strings:\n    \
         $eicar = \"{text}\"\n  condition:\n    $eicar\n}}\n"
    );
    fs::write(folder.join("eicar.yar"), eicar)?;
    let harmless = [
        ("marker", "$a = \"seawall-lab-marker-7f3a91\""),
        (
            "shellcode",
            "$a = { 31 c0 50 68 2f 2f 73 68 68 2f 62 69 6e 89 e3 50 53 89 e1 b0 0b cd 80 }",
        ),
        ("webshell", "$a = \"eval(base64_decode($_POST['seawall-lab']))\" nocase"),
        ("miner", "$a = /stratum\\+tcp:\\/\\/seawall-lab\\.[a-z]{3,8}:[0-9]{4}/"),
    ];
    let rules = harmless.map(|(name, string)| {
        format!("rule Lab_{name} {{\n  strings:\n    {string}\n  condition:\n    $a\n}}\n")
    });
    Ok(fs::write(folder.join("harmless.yar"), rules.join("\n"))?)
}

/// Writes what the other engines need: ClamAV's signature and a list of hashes, each for EICAR.
pub fn write_signatures(folder: &Path) -> anyhow::Result<()> {
    let (clamav, hash) = (folder.join("clamav"), folder.join("hash"));
    fs::create_dir_all(&clamav)?;
    fs::create_dir_all(&hash)?;
    // Of the whole file: MD5, size, name.
    let line = "44d88612fea8a8f36de82e1278abb02f:68:Eicar-Test-Signature\n";
    fs::write(clamav.join("lab.hdb"), line)?;
    let line = "275a021bbfb6489e54d471899f7db9d1663fc695ec2fe2a2c4538aabf651fd0f  Eicar\n";
    Ok(fs::write(hash.join("lab.sha256"), line)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn eicar_has_its_68_bytes() {
        assert_eq!(super::eicar().len(), 68);
    }
}
